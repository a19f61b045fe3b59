"""HTTP in front of the models: the ingress in a replica of its own, which reaches the others through Serve's handles."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import ray.exceptions
import ray.serve.exceptions
from fastapi import FastAPI
from ray import serve
from ray.serve.context import (
    _get_global_client,
)  # `serve.status()` doesn't tell the number of replicas that is aimed at
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve import access_log
from serve.catalog import Catalog
from serve.engine import Chunk
from serve.errors import Overloaded, Unavailable, kept
from serve.routes import Drawing, build_app
from serve.schemas import (
    CompletionRequest,
    DeploymentStatus,
    ImagesRequest,
    InterpolationsRequest,
    Model,
)

DESCRIBE_TIMEOUT_S = 10.0
STATUS_TIMEOUT_S = 2.0
STATUS_AGE_S = 1.0  # every open page asks for it
UNREACHABLE = (
    TimeoutError,
    ray.exceptions.RayError,
    ray.serve.exceptions.RayServeException,
)  # a deployment, or a replica of it


@contextlib.contextmanager
def _reaching(model: str) -> Iterator[None]:
    """Turns what Ray raises where a deployment cannot be reached into an answer for the client."""
    try:
        yield
    except (
        ray.exceptions.RayActorError,
        ray.serve.exceptions.DeploymentUnavailableError,
        TimeoutError,
    ) as error:
        raise Unavailable(
            f"the {model} model does not answer just now: try again in a moment"
        ) from error
    except ray.serve.exceptions.BackPressureError as error:
        raise Overloaded(
            f"too many requests wait for the {model} model: try again in a moment"
        ) from error


class Remote:
    """A deployment as the ingress sees it; `name` says in sentences which."""

    name: str

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def describe(self) -> Model:
        with _reaching(self.name):
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                return await self.handle.describe.remote()

    async def sample(self) -> bytes | None:
        with _reaching(self.name):
            return await self.handle.sample.remote()

    async def registry(self) -> tuple[str, str | None]:
        with _reaching(self.name):
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                return await self.handle.registry.remote()


class RemoteText(Remote):
    """The `Text` deployment (`serve.routes.TextModel`)."""

    name = "text"

    def __init__(self, handle: DeploymentHandle) -> None:
        super().__init__(handle)
        self.streaming = handle.options(stream=True)

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]]:
        with _reaching(self.name):
            return kept(await self.handle.complete.remote(request, client))

    async def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk], None]:
        answers = self.streaming.stream.remote(request, client)
        assert isinstance(answers, DeploymentResponseGenerator)
        unfinished = request.n
        try:
            with _reaching(self.name):
                async for answer in answers:
                    reference, chunk = kept(answer)
                    unfinished -= chunk.finish_reason is not None
                    yield reference, chunk
        finally:
            if unfinished:
                answers.cancel()  # a message of its own to the replica, whether that has ended or not


class RemotePictures(Remote):
    """The `Pictures` deployment (`serve.routes.ImageModel`)."""

    name = "picture"

    async def draw(self, request: ImagesRequest) -> tuple[str, Drawing]:
        with _reaching(self.name):
            return kept(await self.handle.draw.remote(request))

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, Drawing]:
        with _reaching(self.name):
            return kept(await self.handle.interpolate.remote(request))


class ServeCluster:
    """The deployments as the ingress sees them (`serve.routes.Cluster`).

    Args:
        handles: by deployment, of those whose replicas tell their load.
    """

    def __init__(self, handles: dict[str, DeploymentHandle]) -> None:
        self.handles = handles
        self.lock, self.seen, self.seen_at = (
            asyncio.Lock(),
            dict[str, DeploymentStatus](),
            -STATUS_AGE_S,
        )

    async def deployments(self) -> dict[str, DeploymentStatus]:
        """At most `STATUS_AGE_S` old."""
        async with self.lock:
            if time.monotonic() - self.seen_at >= STATUS_AGE_S:
                self.seen = await self._look()
                self.seen_at = time.monotonic()
        return self.seen

    async def _look(self) -> dict[str, DeploymentStatus]:
        client, application = _get_global_client(), serve.get_replica_context().app_name
        assert client is not None
        try:
            details = await asyncio.to_thread(client.get_serve_details)
        except ray.exceptions.RayError as error:
            raise Unavailable(
                "Serve's controller does not answer just now: try again in a moment"
            ) from error
        deployments = details["applications"][application]["deployments"]
        loads = await asyncio.gather(*(self._load(name) for name in deployments))
        return {
            name: _deployment_status(found, load)
            for (name, found), load in zip(deployments.items(), loads, strict=True)
        }

    async def _load(self, name: str) -> dict[str, int | None]:
        """Summed over the replicas that answer; nothing where none does, or where one keeps the others waiting."""
        loads: list[Any] = []
        if name in self.handles:
            with contextlib.suppress(*UNREACHABLE):
                broadcast = self.handles[name].broadcast("load")
                loads = await broadcast.results_async(
                    timeout_s=STATUS_TIMEOUT_S, return_exceptions=True
                )
        answers = [load for load in loads if isinstance(load, dict)]
        return {
            key: sum(answer[key] for answer in answers) if answers else None
            for key in ("slots", "running", "waiting")
        }


def _deployment_status(details: dict[str, Any], load: dict[str, int | None]) -> DeploymentStatus:
    states = [replica["state"] for replica in details["replicas"]]
    return DeploymentStatus.model_validate(
        {
            "replicas": states.count("RUNNING"),
            "starting": states.count("STARTING"),
            "target": details["target_num_replicas"],
            "status": details["status"],
            **load,
        }
    )


@serve.ingress()
class Gateway:
    """HTTP in front of the models; it holds none itself."""

    def __init__(self, text: DeploymentHandle | None, images: DeploymentHandle | None) -> None:
        self.text = None if text is None else RemoteText(text)
        self.images = None if images is None else RemotePictures(images)
        self.cluster = ServeCluster(
            {handle.deployment_name: handle for handle in (text, images) if handle is not None}
        )
        access_log.to_stdout()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(
            self.text, self.images, self.cluster, Catalog(), gives_request_id_back=False
        )  # Serve's proxy does
