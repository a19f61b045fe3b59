"""Models behind the routes in place of Ray Serve's deployments."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from serve.errors import unwrap
from serve.http.protocols import GeneratedImages
from serve.http.schemas import CompletionRequest, GenerationsRequest, InterpolationsRequest, Model
from serve.text.chunks import Chunk


class LocalModel:
    """A replica in this process, as the routes see it (`serve.http.protocols`)."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    async def describe(self) -> Model:
        return await self.replica.describe()

    async def sample(self) -> bytes | None:
        return await self.replica.sample()

    async def registry(self) -> tuple[str, str | None]:
        return await self.replica.registry()

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]]:
        return unwrap(await self.replica.complete(request, client))

    async def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk], None]:
        async with contextlib.aclosing(self.replica.stream(request, client)) as results:
            async for result in results:
                yield unwrap(result)

    async def generate(self, request: GenerationsRequest) -> tuple[str, GeneratedImages]:
        return unwrap(await self.replica.generate(request))

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, GeneratedImages]:
        return unwrap(await self.replica.interpolate(request))


class FailingModel:
    """A text model that raises `error`; when streaming, after one chunk."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def describe(self) -> Any:
        raise self.error

    async def sample(self) -> bytes | None:
        raise self.error

    async def registry(self) -> tuple[str, str | None]:
        raise self.error

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]]:
        raise self.error

    async def stream(self, request: CompletionRequest, client: str) -> Any:
        yield "gpt/1", Chunk("To be", 1, 2)
        raise self.error
