"""The HTTP routes, over two models with asynchronous methods. No Ray."""

import base64
import time
from collections.abc import Awaitable
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response, StreamingResponse

from serve.errors import UnknownModel
from serve.http.model_lookup import describe_models, find_model, find_registry
from serve.http.page_files import page_response
from serve.http.protocols import (
    Catalog,
    Cluster,
    GeneratedImages,
    ImageModel,
    ServedModel,
    TextModel,
)
from serve.http.schemas import (
    Completion,
    CompletionRequest,
    Error,
    GenerateRequest,
    GenerateResponse,
    GenerationsRequest,
    Health,
    Image,
    ImageRequest,
    Images,
    InterpolationsRequest,
    Model,
    Models,
    ModelVersions,
    Status,
)
from serve.http.streaming import EVENT_STREAM, CompletionWriter, usage

PNG: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "description": "As JSON, or as one PNG file.",
    }
}
SAMPLE_TYPES = {"gpt": "text/plain", "gan": "image/png"}
SAMPLE: dict[int | str, dict[str, Any]] = {
    200: {"content": {media_type: {} for media_type in SAMPLE_TYPES.values()}}
}

# The model of 422 replaces FastAPI's own error shape.
router = APIRouter(responses={status: {"model": Error} for status in (400, 404, 422, 429, 503)})

# ---- dependencies; async, because FastAPI runs other dependencies on threads


async def _text_model(http: Request) -> TextModel:
    if http.app.state.text is None:
        raise UnknownModel("no text model is served here: see /v1/models")
    return cast(TextModel, http.app.state.text)


async def _image_model(http: Request) -> ImageModel:
    if http.app.state.images is None:
        raise UnknownModel("no image model is served here: see /v1/models")
    return cast(ImageModel, http.app.state.images)


async def _catalog(http: Request) -> Catalog:
    if http.app.state.catalog is None:
        raise UnknownModel(
            "this server has no registry: only the served versions are known, see /v1/models"
        )
    return cast(Catalog, http.app.state.catalog)


Name = Annotated[str, PathParameter(examples=["gpt"])]
UsedTextModel = Annotated[TextModel, Depends(_text_model)]
UsedImageModel = Annotated[ImageModel, Depends(_image_model)]
UsedCatalog = Annotated[Catalog, Depends(_catalog)]

# ---- what is served


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return page_response()


@router.get("/health")
async def health(http: Request) -> Health:
    """200 while at least one model responds, with the names of those that do."""
    return Health(models=[f"{model.id}/{model.version}" for model in await describe_models(http)])


@router.get("/v1/models")
async def models(http: Request) -> Models:
    """The served models, with version, lineage and metrics."""
    return Models(data=await describe_models(http))


@router.get("/v1/models/{name}")
async def model(name: Name, http: Request) -> Model:
    """One of /v1/models."""
    return await find_model(http, name)


@router.get("/v1/models/{name}/sample", response_class=Response, responses=SAMPLE)
async def sample(name: Name, http: Request) -> Response:
    """The sample that was generated when the served version was exported: a text, or a PNG."""
    found = await find_model(http, name)
    by_kind: dict[str, ServedModel] = {"gpt": http.app.state.text, "gan": http.app.state.images}
    content = await by_kind[found.kind].sample() if found.sample else None
    if content is None:
        raise UnknownModel(f"there is no sample of {found.id}/{found.version}")
    return Response(content, media_type=SAMPLE_TYPES[found.kind])


@router.get("/v1/models/{name}/versions")
async def versions(name: Name, http: Request, catalog: UsedCatalog) -> ModelVersions:
    """All versions of a served model in its registry, with lineage and metrics."""
    return ModelVersions(data=await catalog.versions(await find_registry(http, name), name))


@router.get(
    "/v1/models/{name}/versions/{version}/sample", response_class=Response, responses=SAMPLE
)
async def version_sample(name: Name, version: int, http: Request, catalog: UsedCatalog) -> Response:
    """The sample that was generated when a version was exported: a text, or a PNG."""
    kind, content = await catalog.sample(await find_registry(http, name), name, version)
    return Response(content, media_type=SAMPLE_TYPES[kind])


@router.get("/status")
async def status(http: Request) -> Status:
    """Replicas and their load, and the latency of the last 1,000 requests of each modality."""
    cluster: Cluster | None = http.app.state.cluster
    return Status(
        deployments={} if cluster is None else await cluster.deployments(),
        latency_ms={
            name: latency.percentiles_ms() for name, latency in http.app.state.latency.items()
        },
    )


# ---- text


@router.post(
    "/v1/completions", responses={200: EVENT_STREAM, 413: {"model": Error}, 504: {"model": Error}}
)
async def completions(body: CompletionRequest, http: Request, model: UsedTextModel) -> Completion:
    """Continue a text.

    With `stream`, the response consists of server-sent events: messages of this same shape, then
    `[DONE]`.
    """
    client = http.client.host if http.client else ""
    writer = CompletionWriter(body)
    if body.stream:
        started = time.perf_counter()
        chunks = model.stream(body, client)
        # An error before the first chunk gets its own status, so wait for the chunk.
        first = await anext(chunks)
        http.app.state.latency["text_time_to_first_token"].add(time.perf_counter() - started)
        # FastAPI takes the annotation as the schema of the JSON response.
        return StreamingResponse(  # type: ignore[return-value]
            writer.events(http, first, chunks),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
    reference, texts = await model.complete(body, client)
    total = usage(texts)
    http.state.tokens = total.completion_tokens
    return writer.completion(reference, texts, total)


# ---- images


@router.post("/v1/images/generations", response_model=Images, responses=PNG)
async def images(
    body: GenerationsRequest, http: Request, model: UsedImageModel
) -> Images | Response:
    """Generate images; the same seed gives the same images."""
    return _images_response(body, *await _timed(http, model.generate(body)))


@router.post("/v1/images/interpolations", response_model=Images, responses=PNG)
async def interpolations(
    body: InterpolationsRequest, http: Request, model: UsedImageModel
) -> Images | Response:
    """Interpolate between the images of two seeds, on the great circle between their latents."""
    return _images_response(body, *await _timed(http, model.interpolate(body)))


@router.post("/generate")
async def generate(body: GenerateRequest, http: Request, model: UsedImageModel) -> GenerateResponse:
    """Generate one image."""
    request = GenerationsRequest(seed=body.seed, label=body.label)
    reference, generated = await _timed(http, model.generate(request))
    return GenerateResponse(
        image_base64=base64.b64encode(generated.pngs[0]).decode(),
        seed=generated.seed,
        label=generated.labels[0],
        model=reference,
    )


def _images_response(
    body: ImageRequest, reference: str, generated: GeneratedImages
) -> Images | Response:
    if body.response_format == "png":
        return Response(
            generated.pngs[0],
            media_type="image/png",
            headers={"Raykiln-Seed": str(generated.seed), "Raykiln-Model": reference},
        )
    data = [
        Image(b64_json=base64.b64encode(png).decode(), label=label)
        for png, label in zip(generated.pngs, generated.labels, strict=True)
    ]
    return Images(created=int(time.time()), data=data, seed=generated.seed, model=reference)


async def _timed(
    http: Request, generating: Awaitable[tuple[str, GeneratedImages]]
) -> tuple[str, GeneratedImages]:
    """Await the images and record how long they took."""
    started = time.perf_counter()
    result = await generating
    http.app.state.latency["image"].add(time.perf_counter() - started)
    return result
