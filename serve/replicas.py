"""What a replica of each model does: `Text` writes under continuous batching, `Pictures` draws. Serve calls them; the gateway's handles reach them.

Which bundle a replica serves is its `user_config`: another version swaps in `reconfigure`, without a new process and without
a dropped request.
"""

import asyncio
import contextlib
import functools
import io
import math
import random
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import numpy as np
from PIL import Image

from serve.blocklist import Blocklist
from serve.engine import Chunk, Engine, Stream
from serve.errors import Blocked, Overloaded, Rejected, UnknownModel, WrongValue
from serve.routes import Drawing
from serve.prometheus import PictureMetrics, TextMetrics
from serve.scheduler import Sampling
from serve.schemas import (
    CompletionRequest,
    ImagesRequest,
    InterpolationsRequest,
    Model,
    PictureRequest,
)
from serve.session import ImageSession, TextSession, open_bundle

QUEUE_LIMIT = 64  # requests that may wait at a replica; one more is refused with 429


def _reference(session: TextSession | ImageSession) -> str:
    return f"{session.manifest['name']}/{session.manifest['version']}"


def _check_model(requested: str | None, served: str) -> None:
    if requested not in (None, served, served.rpartition("/")[0]):
        raise UnknownModel(
            f"model {requested!r} is not served here: leave it out, or use {served.rpartition('/')[0]}"
        )


def _describe(session: TextSession | ImageSession, **more: Any) -> Model:
    manifest = session.manifest
    facts = {
        key: manifest[key]
        for key in ("version", "kind", "metrics", "model", "quantization", "dataset", "commit")
    }
    facts["run"] = {
        key: manifest["run"][key] for key in ("name", "step")
    }  # where its storage is, is nobody's business
    created = int(datetime.fromisoformat(manifest["created"]).timestamp())
    return Model.model_validate(
        {
            "id": manifest["name"],
            "created": created,
            **facts,
            "providers": session.providers,
            "sample": session.sample is not None,
            **more,
        }
    )


class Replica:
    """A bundle that is served, and can be swapped for another."""

    session: TextSession | ImageSession

    def __init__(self) -> None:
        self.uri, self.swapping = "", asyncio.Lock()

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Serves the bundle at `user_config["uri"]` from now on; what is under way finishes on the one before."""
        async with self.swapping:  # Serve's calls may overlap, and the last of them must win
            # Serve calls again with the same config where a replica's rank has changed.
            if user_config["uri"] != self.uri or not self._alive():
                await self._swap(user_config["uri"])

    def _alive(self) -> bool:
        return True

    async def _swap(self, uri: str) -> None:
        raise NotImplementedError

    async def sample(self) -> bytes | None:
        return self.session.sample

    async def registry(self) -> tuple[str, str | None]:
        """The model's name, and the registry that the bundle lies in; None where it lies elsewhere."""
        place = f"/{_reference(self.session)}"
        return self.session.manifest["name"], self.uri.removesuffix(place) if self.uri.endswith(
            place
        ) else None


class Text(Replica):
    """A GPT bundle under continuous batching."""

    session: TextSession

    def __init__(
        self,
        slots: int,
        threads: int,
        timeout_s: float,
        providers: list[str] | None = None,
        chunks_per_s: float = math.inf,
        blocklist: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.slots, self.threads, self.timeout_s, self.providers = (
            slots,
            threads,
            timeout_s,
            providers,
        )
        self.chunks_per_s, self.blocklist = (
            chunks_per_s,
            Blocklist(blocklist) if blocklist else None,
        )
        self.engine: Engine | None = None
        self.metrics = TextMetrics()

    def _alive(self) -> bool:
        return self.engine is not None and self.engine.alive

    async def _swap(self, uri: str) -> None:
        session = await asyncio.to_thread(
            open_bundle,
            TextSession,
            uri,
            slots=self.slots,
            threads=self.threads,
            providers=self.providers,
        )
        before = self.engine
        self.uri, self.session, self.reference = uri, session, _reference(session)
        observe = functools.partial(self.metrics.observe, model=self.reference)
        self.engine = Engine(
            session,
            queue_limit=QUEUE_LIMIT,
            timeout_s=self.timeout_s,
            chunks_per_s=self.chunks_per_s,
            blocklist=self.blocklist,
            observe=observe,
        )
        if before is not None:
            before.close()
            self.metrics.rollouts.inc(1, {"model": self.reference})

    async def check_health(self) -> None:
        """Serve asks every second: so fresh are the gauges, too. Async, since Serve would call it on another thread."""
        if self.engine is None or not self._alive():
            raise RuntimeError("the engine's thread has ended")
        self.metrics.set_load(self.engine.status())

    async def load(self) -> dict[str, int]:
        assert self.engine is not None
        return self.engine.status()

    async def describe(self) -> Model:
        assert self.engine is not None
        return _describe(self.session, engine=self.engine.status())

    async def complete(
        self, request: CompletionRequest, client: str
    ) -> tuple[str, list[Chunk]] | Rejected:
        try:
            reference = self.reference
            return reference, await self._submit(request, client).results()
        except Rejected as error:
            return error

    async def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk] | Rejected, None]:
        try:
            reference = self.reference
            async with contextlib.aclosing(self._submit(request, client).chunks()) as chunks:
                async for chunk in chunks:
                    yield reference, chunk
        except Rejected as error:
            yield error

    def _submit(self, request: CompletionRequest, client: str) -> Stream:
        """Without an await in between, so that no swap comes between the choice of the engine and its taking the request."""
        assert self.engine is not None
        _check_model(request.model, self.reference)
        if request.timeout_s is not None and request.timeout_s > self.timeout_s:
            raise WrongValue(
                f"timeout_s is {request.timeout_s:g}, and a request may take {self.timeout_s:g} s here: ask for no more",
                "timeout_s",
            )
        sampling = Sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=random.randrange(2**31) if request.seed is None else request.seed,
            stop=request.stops,
            logprobs=request.logprobs,
        )
        try:
            return self.engine.submit(
                request.prompt, sampling, client, n=request.n, timeout_s=request.timeout_s
            )
        except Blocked:
            self.metrics.prompt_blocked(self.reference)
            raise


class Pictures(Replica):
    """A generator's bundle; requests are drawn one after the other: a batch of 32 is 10 to 20 % faster a picture on a CPU."""

    session: ImageSession

    def __init__(self, threads: int, providers: list[str] | None = None) -> None:
        super().__init__()
        self.threads, self.providers = threads, providers
        self.waiting = 0
        self.executor = ThreadPoolExecutor(1, "pictures")
        self.metrics = PictureMetrics()

    async def _swap(self, uri: str) -> None:
        session = await asyncio.to_thread(
            open_bundle, ImageSession, uri, threads=self.threads, providers=self.providers
        )
        rollout = self.uri != ""
        self.uri, self.session = uri, session
        if rollout:
            self.metrics.rollouts.inc(1, {"model": _reference(self.session)})

    async def load(self) -> dict[str, int]:
        running = min(self.waiting, 1)
        return {"slots": 1, "running": running, "waiting": self.waiting - running}

    async def describe(self) -> Model:
        return _describe(self.session)

    async def draw(self, request: ImagesRequest) -> tuple[str, Drawing] | Rejected:
        session = self.session
        try:
            _check_model(request.model, _reference(session))
            _check_size(session, request.size)
            return await self._in_turn(_draw, session, request, _label(session, request))
        except Rejected as error:
            return error

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, Drawing] | Rejected:
        session = self.session
        try:
            _check_model(request.model, _reference(session))
            return await self._in_turn(_interpolate, session, request, _label(session, request))
        except Rejected as error:
            return error

    async def _in_turn(
        self,
        make: Callable[[ImageSession, Any, int | None], Drawing],
        session: ImageSession,
        request: PictureRequest,
        label: int | None,
    ) -> tuple[str, Drawing]:
        if self.waiting >= QUEUE_LIMIT:
            raise Overloaded(f"{self.waiting} requests for pictures wait: try again in a moment")
        self.waiting += 1
        started = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            drawing = await loop.run_in_executor(self.executor, make, session, request, label)
        finally:
            self.waiting -= 1
        self.metrics.drawn(len(drawing.labels), time.monotonic() - started, _reference(session))
        return _reference(session), drawing


def _draw(session: ImageSession, request: ImagesRequest, label: int | None) -> Drawing:
    seed = random.randrange(2**31) if request.seed is None else request.seed
    images = session.pictures(seed, request.n, label, request.truncation)
    return _drawing(
        session,
        request,
        images,
        session.labels(seed, request.n, label),
        seed,
        columns=math.ceil(math.sqrt(request.n)),
    )


def _interpolate(
    session: ImageSession, request: InterpolationsRequest, label: int | None
) -> Drawing:
    images = session.interpolation(
        request.seed, request.to_seed, request.steps, label, request.truncation
    )
    labels = session.labels(request.seed, 1, label)
    return _drawing(
        session,
        request,
        images,
        labels and labels * request.steps,
        request.seed,
        columns=request.steps,
    )


def _drawing(
    session: ImageSession,
    request: PictureRequest,
    images: np.ndarray,
    labels: list[int] | None,
    seed: int,
    columns: int,
) -> Drawing:
    """Pictures (N, H, W, C) as PNG files, or as one of `columns` pictures a row, with the name of each one's class."""
    names = session.manifest["model"]["class_names"]
    shown = images if request.response_format == "b64_json" else [_sheet(images, columns)]
    return Drawing(
        [_png(image) for image in shown],
        [None] * len(images) if labels is None else [names[label] for label in labels],
        seed,
    )


def _sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures (N, H, W, C) side by side in rows of `columns`, (rows x H, columns x W, C); what is left over is white."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:count] = images
    return (
        cells.reshape(rows, columns, height, width, channels)
        .swapaxes(1, 2)
        .reshape(rows * height, columns * width, channels)
    )


def _png(image: np.ndarray) -> bytes:
    """A (H, W, C) uint8 picture as a PNG file, grey where C is 1."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def _check_size(session: ImageSession, size: str | None) -> None:
    side = session.manifest["model"]["image_size"]
    if size not in (None, "auto", f"{side}x{side}"):
        raise WrongValue(
            f"size is {size!r}, and this model draws {side}x{side}: leave it out", "size"
        )


def _label(session: ImageSession, request: PictureRequest) -> int | None:
    """The class that a request asks for, by `label` or by its prompt; None: any.

    Raises:
        WrongValue: the model has no such class, or none at all.
    """
    wanted, param = (
        (request.prompt.strip(), "prompt") if request.label is None else (request.label, "label")
    )
    if wanted == "":
        return None
    names: list[str] = session.manifest["model"]["class_names"] or []
    if not names:
        raise WrongValue(
            f"{param} is {wanted!r}, and this model has no classes: leave it out", param
        )
    if isinstance(wanted, int) and 0 <= wanted < len(names):
        return wanted
    if wanted in names:  # before any that differs in case alone
        return names.index(str(wanted))
    folded = [name.casefold() for name in names]
    if isinstance(wanted, str) and wanted.casefold() in folded:
        return folded.index(wanted.casefold())
    raise WrongValue(
        f"{param} is {wanted!r}, which is no class of this model: use one of {', '.join(names)}",
        param,
    )
