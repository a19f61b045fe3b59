"""The applications that `serve_hop.py` compares: the text model alone, with its ingress near or far, its tokens together or each by itself."""

import math
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.gateway import RemoteText
from serve.routes import build_app
from serve.replicas import Text
from tests.support.fakes import Here

TIMEOUT_S = 300.0


class PacedText(Text):
    """The replica's text model.

    Args:
        chunks_per_s: as for `Text`; None: each step's tokens at once.
    """

    def __init__(self, slots: int, chunks_per_s: float | None) -> None:
        super().__init__(
            slots,
            threads=1,
            timeout_s=TIMEOUT_S,
            chunks_per_s=math.inf if chunks_per_s is None else chunks_per_s,
        )
        self.every_step = chunks_per_s is None

    async def _swap(self, uri: str) -> None:
        await super()._swap(uri)
        assert self.engine is not None
        if self.every_step:
            self.engine.interval_s = 0.0


@serve.ingress()
class Gateway:
    """As `serve.gateway.Gateway`: HTTP in a process of its own."""

    def __init__(self, text: DeploymentHandle) -> None:
        self.text = RemoteText(text)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.text, None, gives_request_id_back=False)


@serve.ingress()
class TextWithIngress(PacedText):
    """HTTP and engine in one process."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(Here(self), None, gives_request_id_back=False)


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
