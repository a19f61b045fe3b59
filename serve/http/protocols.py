"""What the routes need: two models, the cluster's status and the registry. No Ray."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from serve.http.schemas import (
    CompletionRequest,
    DeploymentStatus,
    GenerationsRequest,
    InterpolationsRequest,
    Model,
    ModelVersion,
)
from serve.text.chunks import Chunk


@dataclass(frozen=True)
class GeneratedImages:
    """The images of one request.

    Attributes:
        pngs: one PNG file per image, or a single one that shows all images.
        labels: the class of each image; None if the model has no classes.
        seed: the seed that was used.
    """

    pngs: list[bytes]
    labels: list[str | None]
    seed: int


class ServedModel(Protocol):
    """A model behind the routes. All methods may raise `serve.errors.RequestError`."""

    async def describe(self) -> Model: ...

    async def sample(self) -> bytes | None:
        """Return the sample in the model's bundle, or None."""
        ...

    async def registry(self) -> tuple[str, str | None]:
        """Return the model's name, and the registry that holds its bundle or None."""
        ...


class TextModel(ServedModel, Protocol):
    """Results come with the name and version of the model that generated them (`gpt/3`)."""

    async def complete(
        self, request: CompletionRequest, client: str
    ) -> tuple[str, list[Chunk]]: ...

    def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk], None]: ...


class ImageModel(ServedModel, Protocol):
    """Results come with the name and version of the model that generated them (`dcgan/1`)."""

    async def generate(self, request: GenerationsRequest) -> tuple[str, GeneratedImages]: ...

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, GeneratedImages]: ...


class Cluster(Protocol):
    """The deployments and their replicas."""

    async def deployments(self) -> dict[str, DeploymentStatus]: ...


class Catalog(Protocol):
    """The versions of a model in the registry at `root`.

    Both methods may raise `serve.errors.RequestError`.
    """

    async def versions(self, root: str, name: str) -> list[ModelVersion]: ...

    async def sample(self, root: str, name: str, version: int) -> tuple[str, bytes]: ...
