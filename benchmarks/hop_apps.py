"""The applications that `serve_hop.py` compares: a text model, its ingress near or far."""

import math
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.http.app import build_app
from serve.remote import RemoteTextModel
from serve.replicas import TextReplica
from tests.support.fakes import LocalModel

TIMEOUT_S = 300.0


class PacedText(TextReplica):
    """The text replica, with a limit on the chunks that it streams.

    Args:
        slots: of the KV cache.
        chunks_per_s: the limit, as for `TextReplica`; None: a chunk for every step.
    """

    def __init__(self, slots: int, chunks_per_s: float | None) -> None:
        super().__init__(
            slots,
            threads=1,
            timeout_s=TIMEOUT_S,
            chunks_per_s=math.inf if chunks_per_s is None else chunks_per_s,
        )
        self.every_step = chunks_per_s is None

    async def _load_bundle(self, uri: str) -> None:
        await super()._load_bundle(uri)
        assert self.engine is not None
        if self.every_step:
            self.engine.pace.interval_s = 0.0


@serve.ingress()
class Gateway:
    """An ingress in a process of its own, as `serve.gateway.Gateway`."""

    def __init__(self, text: DeploymentHandle[TextReplica]) -> None:
        self.text = RemoteTextModel(text)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.text, None, returns_request_id=False)


@serve.ingress()
class TextWithIngress(PacedText):
    """An ingress in the engine's process."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(LocalModel(self), None, returns_request_id=False)


def build(
    uri: str, ingress_in_engine: bool, slots: int, chunks_per_s: float | None
) -> serve.Application:
    """Return an application that serves the bundle at `uri`."""
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1000}
    text_options = options | {"user_config": {"uri": uri}}
    if ingress_in_engine:
        return serve.deployment(**text_options)(TextWithIngress).bind(slots, chunks_per_s)
    backoff = {"initial_backoff_s": 0.005, "max_backoff_s": 0.02}
    text = serve.deployment(**text_options, request_router_config=backoff)(PacedText)
    return serve.deployment(**options)(Gateway).bind(text.bind(slots, chunks_per_s))
