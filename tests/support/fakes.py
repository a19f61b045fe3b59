"""What tests put behind the ingress in place of Serve's deployments."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from serve.engine import Chunk
from serve.errors import kept
from serve.routes import Drawing
from serve.schemas import CompletionRequest, ImagesRequest, InterpolationsRequest, Model


class Here:
    """The two deployments' classes as the ingress sees them, without Ray in between."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    async def describe(self) -> Model:
        return await self.replica.describe()

    async def sample(self) -> bytes | None:
        return await self.replica.sample()

    async def registry(self) -> tuple[str, str | None]:
        return await self.replica.registry()

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]]:
        return kept(await self.replica.complete(request, client))

    async def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk], None]:
        async with contextlib.aclosing(self.replica.stream(request, client)) as answers:
            async for answer in answers:
                yield kept(answer)

    async def draw(self, request: ImagesRequest) -> tuple[str, Drawing]:
        return kept(await self.replica.draw(request))

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, Drawing]:
        return kept(await self.replica.interpolate(request))


class Failing:
    """A text model that gives one chunk where it streams, and then fails."""

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
