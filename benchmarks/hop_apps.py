"""The applications that `serve_hop.py` compares.

All serve the text model alone, with the HTTP routes in the engine's process or in another, and with
tokens sent together or one by one.
"""

import math
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.app import build_app
from serve.remote import RemoteTextModel
from serve.replicas import TextReplica
from tests.support.fakes import LocalModel

TIMEOUT_S = 300.0


class PacedText(TextReplica):
    """A text replica with an adjustable pace.

    Args:
        chunks_per_s: as for `TextReplica`; None: a chunk at every step.
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
    """HTTP in a process of its own, as in `serve.gateway.Gateway`."""

    def __init__(self, text: DeploymentHandle) -> None:
        self.text = RemoteTextModel(text)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.text, None, returns_request_id=False)


@serve.ingress()
class TextWithIngress(PacedText):
    """HTTP and engine in one process."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(LocalModel(self), None, returns_request_id=False)


def build(uri: str, near: bool, slots: int, chunks_per_s: float | None) -> serve.Application:
    options: dict[str, Any] = {
        "user_config": {"uri": uri},
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 1000,
    }
    if near:
        return serve.deployment(**options)(TextWithIngress).bind(slots, chunks_per_s)
    text = serve.deployment(
        **options, request_router_config={"initial_backoff_s": 0.005, "max_backoff_s": 0.02}
    )(PacedText)
    return serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)(
        Gateway
    ).bind(text.bind(slots, chunks_per_s))
