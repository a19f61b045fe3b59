"""The models as the gateway calls them: deployments behind Ray Serve's handles."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeAlias, cast

import ray.exceptions
import ray.serve.exceptions
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve.errors import Overloaded, Unavailable, unwrap
from serve.http.protocols import GeneratedImages
from serve.http.schemas import CompletionRequest, GenerationsRequest, InterpolationsRequest, Model
from serve.text.chunks import Chunk

Handle: TypeAlias = DeploymentHandle[Any]

DESCRIBE_TIMEOUT_S = 10.0
# What Ray raises if a deployment, or one of its replicas, does not answer.
UNREACHABLE = (
    TimeoutError,
    ray.exceptions.RayError,
    ray.serve.exceptions.RayServeException,
)


@contextlib.contextmanager
def _translated_errors(modality: str) -> Iterator[None]:
    """Translate what Ray raises if a deployment is unreachable into errors for the client."""
    try:
        yield
    except (
        ray.exceptions.RayActorError,
        ray.serve.exceptions.DeploymentUnavailableError,
        TimeoutError,
    ) as error:
        raise Unavailable(
            f"the {modality} model does not answer at the moment: try again in a moment"
        ) from error
    except ray.serve.exceptions.BackPressureError as error:
        raise Overloaded(
            f"too many requests wait for the {modality} model: try again in a moment"
        ) from error


class RemoteModel:
    """A model in another process (`serve.http.protocols.ServedModel`)."""

    modality: str  # for error messages

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    async def describe(self) -> Model:
        with _translated_errors(self.modality):
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                return cast(Model, await self.handle.describe.remote())

    async def sample(self) -> bytes | None:
        with _translated_errors(self.modality):
            return cast("bytes | None", await self.handle.sample.remote())

    async def registry(self) -> tuple[str, str | None]:
        with _translated_errors(self.modality):
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                return cast("tuple[str, str | None]", await self.handle.registry.remote())


class RemoteTextModel(RemoteModel):
    """The deployment `TextReplica` (`serve.http.protocols.TextModel`)."""

    modality = "text"

    def __init__(self, handle: Handle) -> None:
        super().__init__(handle)
        self.streaming = handle.options(stream=True)

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]]:
        with _translated_errors(self.modality):
            result = await self.handle.complete.remote(request, client)
        return cast("tuple[str, list[Chunk]]", unwrap(result))

    async def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk], None]:
        results = self.streaming.stream.remote(request, client)
        assert isinstance(results, DeploymentResponseGenerator)
        unfinished = request.n
        try:
            with _translated_errors(self.modality):
                async for result in results:
                    reference, chunk = unwrap(result)
                    unfinished -= chunk.finish_reason is not None
                    yield reference, chunk
        finally:
            # Only if needed: `cancel` sends the replica a message even if the stream has ended.
            if unfinished:
                results.cancel()


class RemoteImageModel(RemoteModel):
    """The deployment `ImageReplica` (`serve.http.protocols.ImageModel`)."""

    modality = "image"

    async def generate(self, request: GenerationsRequest) -> tuple[str, GeneratedImages]:
        with _translated_errors(self.modality):
            result = await self.handle.generate.remote(request)
        return cast("tuple[str, GeneratedImages]", unwrap(result))

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, GeneratedImages]:
        with _translated_errors(self.modality):
            result = await self.handle.interpolate.remote(request)
        return cast("tuple[str, GeneratedImages]", unwrap(result))
