"""The HTTP routes, over two models that answer asynchronously. No Ray here: tests call it with an in-memory transport."""

import asyncio
import base64
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import exception_handlers
from serve.access_log import AccessLog
from serve.engine import Chunk
from serve.errors import Rejected, UnknownModel
from serve.latency import Latency
from serve.schemas import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    DeploymentStatus,
    Error,
    Generated,
    GenerateRequest,
    Health,
    Images,
    ImagesRequest,
    InterpolationsRequest,
    Model,
    Models,
    ModelVersion,
    ModelVersions,
    Picture,
    PictureRequest,
    Status,
    Usage,
)

Answer = TypeVar("Answer")

MAX_BODY_BYTES = 1024 * 1024
PAGE = Path(__file__).parent / "page"
# The page loads nothing from elsewhere, and a prompt's text can never become a script.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-cache",
}

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """What a picture model drew: PNG files (one of each picture, or one of all), each picture's class (None: it has none), and the seed."""

    pngs: list[bytes]
    labels: list[str | None]
    seed: int


class TextModel(Protocol):
    """Answers come with the name and version of the model that gave them; all may raise `Rejected`.

    `registry` is the model's name and the registry that its bundle lies in, None where it lies elsewhere.
    """

    async def describe(self) -> Model: ...

    async def sample(self) -> bytes | None: ...

    async def registry(self) -> tuple[str, str | None]: ...

    async def complete(
        self, request: CompletionRequest, client: str
    ) -> tuple[str, list[Chunk]]: ...

    def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk], None]: ...


class ImageModel(Protocol):
    """As `TextModel`."""

    async def describe(self) -> Model: ...

    async def sample(self) -> bytes | None: ...

    async def registry(self) -> tuple[str, str | None]: ...

    async def draw(self, request: ImagesRequest) -> tuple[str, Drawing]: ...

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, Drawing]: ...


class Cluster(Protocol):
    """What replicas there are."""

    async def deployments(self) -> dict[str, DeploymentStatus]: ...


class Catalog(Protocol):
    """The versions of a model in the registry at `root`; both may raise `Rejected`."""

    async def versions(self, root: str, name: str) -> list[ModelVersion]: ...

    async def sample(self, root: str, name: str, version: int) -> tuple[str, bytes]: ...


MESSAGE = {
    "type": "string",
    "contentMediaType": "application/json",
    "contentSchema": {
        "anyOf": [
            {"$ref": "#/components/schemas/Completion"},
            {"$ref": "#/components/schemas/Error"},
        ]
    },
}
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"anyOf": [{"const": "[DONE]"}, MESSAGE]}},
}
EVENT_STREAM: dict[str, Any] = {  # as FastAPI describes its own
    "description": "The whole text, or with `stream` server-sent events.",
    "content": {
        "text/event-stream": {"itemSchema": EVENT, "example": "data: {...}\n\ndata: [DONE]\n\n"}
    },
}
router = APIRouter(
    responses={
        status: {"model": Error} for status in (400, 404, 422, 429, 503)
    }  # 422: in place of FastAPI's own shape
)


class App(FastAPI):
    """FastAPI with the access log around everything: what crashes is answered outside of the middleware that one can add."""

    def build_middleware_stack(self) -> ASGIApp:
        return AccessLog(super().build_middleware_stack(), self.state.gives_request_id_back)


def build_app(
    text: TextModel | None,
    images: ImageModel | None,
    cluster: Cluster | None = None,
    catalog: Catalog | None = None,
    gives_request_id_back: bool = True,
) -> FastAPI:
    """The ASGI application; the routes of a model that is None answer 404.

    Args:
        cluster: for /status; None: there are no replicas to tell of.
        catalog: for /v1/models/NAME/versions; None: there is no registry to tell of.
        gives_request_id_back: see `serve.access_log.AccessLog`.
    """
    app = App(title="raykiln", summary="Text and pictures, in OpenAI's shapes.", redoc_url=None)
    app.state.text, app.state.images, app.state.cluster, app.state.catalog = (
        text,
        images,
        cluster,
        catalog,
    )
    app.state.latency = {"text_first_token": Latency(), "picture": Latency()}
    app.state.gives_request_id_back = gives_request_id_back
    app.include_router(router)
    app.mount("/page", PageFiles(directory=PAGE))
    app.add_middleware(BodyLimit)
    exception_handlers.add_to(app)
    return app


# Async, though they wait for nothing: FastAPI runs other dependencies on threads.


async def _text_model(http: Request) -> TextModel:
    if http.app.state.text is None:
        raise UnknownModel("no text model is served here: see /v1/models")
    return http.app.state.text


async def _image_model(http: Request) -> ImageModel:
    if http.app.state.images is None:
        raise UnknownModel("no picture model is served here: see /v1/models")
    return http.app.state.images


async def _catalog(http: Request) -> Catalog:
    if http.app.state.catalog is None:
        raise UnknownModel(
            "this server knows of no registry: it tells of what it serves alone, at /v1/models"
        )
    return http.app.state.catalog


# ---- routes

Name = Annotated[str, PathParameter(examples=["gpt"])]


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


@router.get("/health")
async def health(http: Request) -> Health:
    """200 while a model answers, with those that do."""
    return Health(models=[f"{model.id}/{model.version}" for model in await _describe(http)])


@router.get("/v1/models")
async def models(http: Request) -> Models:
    """What is served, with version, lineage and metrics."""
    return Models(data=await _describe(http))


@router.get("/v1/models/{name}")
async def model(name: Name, http: Request) -> Model:
    """One of /v1/models."""
    return await _served(http, name)


@router.get("/v1/models/{name}/sample", response_class=Response, responses=SAMPLE)
async def sample(name: Name, http: Request) -> Response:
    """What the version that is served made at its export: a text, or a PNG of pictures."""
    served = await _served(http, name)
    made = (
        await {"gpt": http.app.state.text, "gan": http.app.state.images}[served.kind].sample()
        if served.sample
        else None
    )
    if made is None:
        raise UnknownModel(f"there is no sample of {served.id}/{served.version}")
    return Response(made, media_type=SAMPLE_TYPES[served.kind])


@router.get("/v1/models/{name}/versions")
async def versions(
    name: Name, http: Request, catalog: Annotated[Catalog, Depends(_catalog)]
) -> ModelVersions:
    """All versions in the registry of a model that is served, with lineage and metrics."""
    return ModelVersions(data=await catalog.versions(await _registry(http, name), name))


@router.get(
    "/v1/models/{name}/versions/{version}/sample", response_class=Response, responses=SAMPLE
)
async def version_sample(
    name: Name, version: int, http: Request, catalog: Annotated[Catalog, Depends(_catalog)]
) -> Response:
    """What a version made at its export: a text, or a PNG of pictures."""
    kind, made = await catalog.sample(await _registry(http, name), name, version)
    return Response(made, media_type=SAMPLE_TYPES[kind])


@router.get("/status")
async def status(http: Request) -> Status:
    """Replicas and their load, and how long the last 1,000 requests of a kind took here."""
    cluster: Cluster | None = http.app.state.cluster
    return Status(
        deployments={} if cluster is None else await cluster.deployments(),
        latency_ms={
            kind: latency.percentiles_ms() for kind, latency in http.app.state.latency.items()
        },
    )


@router.post(
    "/v1/completions", responses={200: EVENT_STREAM, 413: {"model": Error}, 504: {"model": Error}}
)
async def completions(
    body: CompletionRequest, http: Request, model: Annotated[TextModel, Depends(_text_model)]
) -> Completion:
    """Continues a text. With `stream`, server-sent events: messages of this same shape, then `[DONE]`."""
    client = http.client.host if http.client else ""
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    if body.stream:
        started = time.perf_counter()
        chunks = model.stream(body, client)
        first = await anext(chunks)  # a refusal must come before the status line has gone
        http.app.state.latency["text_first_token"].add(time.perf_counter() - started)
        events = _events(body, http, head, first, chunks)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )  # type: ignore[return-value]
    reference, texts = await model.complete(body, client)
    usage = _usage(texts)
    http.state.tokens = usage.completion_tokens
    return _completion(body, head, reference, texts, usage)


@router.post("/v1/images/generations", response_model=Images, responses=PNG)
async def images(
    body: ImagesRequest, http: Request, model: Annotated[ImageModel, Depends(_image_model)]
) -> Images | Response:
    """Draws pictures, the same for the same seed."""
    return _drawn(body, *await _timed(http, model.draw(body)))


@router.post("/v1/images/interpolations", response_model=Images, responses=PNG)
async def interpolations(
    body: InterpolationsRequest, http: Request, model: Annotated[ImageModel, Depends(_image_model)]
) -> Images | Response:
    """Draws the way from one seed's picture to another's, along the great circle between their latents."""
    return _drawn(body, *await _timed(http, model.interpolate(body)))


@router.post("/generate")
async def generate(
    body: GenerateRequest, http: Request, model: Annotated[ImageModel, Depends(_image_model)]
) -> Generated:
    """Draws one picture."""
    reference, drawing = await _timed(
        http, model.draw(ImagesRequest(seed=body.seed, label=body.label))
    )
    return Generated(
        image_base64=base64.b64encode(drawing.pngs[0]).decode(),
        seed=drawing.seed,
        label=drawing.labels[0],
        model=reference,
    )


def _drawn(body: PictureRequest, reference: str, drawing: Drawing) -> Images | Response:
    if body.response_format == "png":
        return Response(
            drawing.pngs[0],
            media_type="image/png",
            headers={"Raykiln-Seed": str(drawing.seed), "Raykiln-Model": reference},
        )
    data = [
        Picture(b64_json=base64.b64encode(png).decode(), label=label)
        for png, label in zip(drawing.pngs, drawing.labels, strict=True)
    ]
    return Images(created=int(time.time()), data=data, seed=drawing.seed, model=reference)


async def _timed(http: Request, drawing: Awaitable[tuple[str, Drawing]]) -> tuple[str, Drawing]:
    started = time.perf_counter()
    answer = await drawing
    http.app.state.latency["picture"].add(time.perf_counter() - started)
    return answer


async def _describe(http: Request) -> list[Model]:
    """The models that answer; one that is away for a moment does not hide the other.

    Raises:
        Exception: what the first raised, where none answers.
    """
    described, failures = await _asked(http, lambda model: model.describe())
    if failures and not described:
        raise failures[0]
    for failure in failures:
        logger.warning("a model does not describe itself", exc_info=failure)
    return described


async def _served(http: Request, name: str) -> Model:
    described, failures = await _asked(http, lambda model: model.describe())
    for model in described:
        if model.id == name:
            return model
    raise _unknown(name, [model.id for model in described], failures)


async def _registry(http: Request, name: str) -> str:
    """Where the version of the model lies that is served, and others beside it."""
    found, failures = await _asked(http, lambda model: model.registry())
    for known, root in found:
        if known == name and root is not None:
            return root
        if known == name:
            raise UnknownModel(
                f"{name} is served from a folder that is in no registry: /v1/models/{name} tells all there is"
            )
    raise _unknown(name, [known for known, _ in found], failures)


def _unknown(name: str, known: list[str], failures: list[BaseException]) -> BaseException:
    """Of a name that none of those who answered has; it may be that of one that did not."""
    return (
        failures[0]
        if failures
        else UnknownModel(f"model {name!r} is not served here: use {' or '.join(known)}")
    )


async def _asked(
    http: Request, question: Callable[[TextModel | ImageModel], Awaitable[Answer]]
) -> tuple[list[Answer], list[BaseException]]:
    """The answers of the models that are served, and what was raised by those who gave none."""
    served = [model for model in (http.app.state.text, http.app.state.images) if model is not None]
    answers = await asyncio.gather(*(question(model) for model in served), return_exceptions=True)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    return [answer for answer in answers if not isinstance(answer, BaseException)], failures


# ---- completions on the wire


def _completion(
    body: CompletionRequest,
    head: dict[str, Any],
    reference: str,
    chunks: list[Chunk],
    usage: Usage | None,
) -> Completion:
    choices = [
        CompletionChoice(
            index=chunk.choice,
            text=chunk.text,
            finish_reason=chunk.finish_reason,  # type: ignore[arg-type]
            logprobs=None if body.logprobs is None else _logprobs(chunk),
        )
        for chunk in chunks
    ]
    return Completion(
        **head,
        model=reference.rpartition("/")[0],
        system_fingerprint=reference,
        choices=choices,
        usage=usage,
    )


def _logprobs(chunk: Chunk) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[told.token for told in chunk.logprobs],
        token_logprobs=[told.logprob for told in chunk.logprobs],
        top_logprobs=[told.top for told in chunk.logprobs],
        text_offset=[told.offset for told in chunk.logprobs],
    )


def _usage(latest: Collection[Chunk]) -> Usage:
    """A request's, from each text's latest chunk; the prompt counts once."""
    prompt, completion = (
        max(chunk.prompt_tokens for chunk in latest),
        sum(chunk.completion_tokens for chunk in latest),
    )
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


async def _events(
    body: CompletionRequest,
    http: Request,
    head: dict[str, Any],
    first: tuple[str, Chunk],
    chunks: AsyncGenerator[tuple[str, Chunk], None],
) -> AsyncGenerator[str, None]:
    """A stream's server-sent events; the client's going ends the model's work."""
    async with contextlib.aclosing(chunks):
        reference, chunk = first
        latest: dict[int, Chunk] = {}
        try:
            while True:
                latest[chunk.choice] = chunk
                last = sum(one.finish_reason is not None for one in latest.values()) == body.n
                usage = _usage(latest.values())
                http.state.tokens = usage.completion_tokens
                told = usage if last or body.stream_options.continuous_usage_stats else None
                message = _completion(body, head, reference, [chunk], told)
                event = f"data: {message.model_dump_json()}\n\n"
                if last:
                    break
                yield event
                reference, chunk = await anext(chunks)
        except Rejected as error:
            yield f"data: {json.dumps(exception_handlers.refusal(error))}\n\n"
            return
        except Exception:
            logger.exception("a stream broke off")
            yield f"data: {json.dumps(exception_handlers.CRASH)}\n\n"
            return
        if body.stream_options.include_usage:
            event += f"data: {message.model_copy(update={'choices': []}).model_dump_json()}\n\n"
        yield event + "data: [DONE]\n\n"  # in one piece, since each costs the proxy as much


# ---- the page's files, and what goes around every route


class PageFiles(StaticFiles):
    """The page's files; a browser asks each time whether they have changed, so that none of another version is among them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


class BodyLimit:
    """Refuses bodies above `MAX_BODY_BYTES` while they come in, whatever their headers say."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(
                    413, f"the body is larger than {MAX_BODY_BYTES} bytes: send less"
                )
            return message

        await self.app(scope, counted, send)
