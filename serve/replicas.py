"""What a replica of each deployment does: generate text or images from one bundle.

The bundle's URI is the deployment's `user_config`. When it changes, `reconfigure` loads the other
version without a new process and without dropping a request.
"""

import asyncio
import contextlib
import functools
import math
import random
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from models import bundle
from models.images import contact_sheet, png
from serve.errors import InvalidValue, Overloaded, PromptBlocked, RequestError, UnknownModel
from serve.http.protocols import GeneratedImages
from serve.http.schemas import (
    CompletionRequest,
    GenerationsRequest,
    ImageRequest,
    InterpolationsRequest,
    Model,
)
from serve.prometheus import ImageMetrics, TextMetrics
from serve.session import ImageSession, TextSession, open_bundle
from serve.text.blocklist import Blocklist
from serve.text.chunks import Chunk
from serve.text.engine import Engine
from serve.text.generation import Generation
from serve.text.sampling import Sampling

QUEUE_LIMIT = 64  # requests that can wait at a replica; further ones are refused with 429


class Replica:
    """Serves a bundle, which can be replaced by another.

    Attributes:
        uri: the bundle's URI.
        loading: held while a bundle is loaded.
    """

    session: TextSession | ImageSession

    def __init__(self) -> None:
        self.uri, self.loading = "", asyncio.Lock()

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Serve the bundle at `user_config["uri"]` from now on.

        Requests that are running finish on the previous bundle.
        """
        # Ray Serve's calls may overlap, and the last one has to win.
        async with self.loading:
            # Ray Serve calls again with the same config when a replica's rank changes.
            if user_config["uri"] != self.uri or not self._alive():
                await self._load_bundle(user_config["uri"])

    def _alive(self) -> bool:
        return True

    async def _load_bundle(self, uri: str) -> None:
        raise NotImplementedError

    async def sample(self) -> bytes | None:
        return self.session.sample

    async def registry(self) -> tuple[str, str | None]:
        """Return the model's name, and the registry that holds the bundle or None."""
        path = f"/{_reference(self.session)}"
        root = self.uri.removesuffix(path) if self.uri.endswith(path) else None
        return self.session.manifest["name"], root


class TextReplica(Replica):
    """Serves a GPT bundle with continuous batching.

    Args:
        slots: texts that are generated at once.
        threads: of ONNX Runtime.
        timeout_s: the longest time that a request may take.
        providers: as for `serve.session.TextSession`.
        chunks_per_s: as for `serve.text.engine.Engine`.
        blocklist: phrases that no prompt and no text may contain.
    """

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
        self.slots, self.threads, self.timeout_s = slots, threads, timeout_s
        self.providers, self.chunks_per_s = providers, chunks_per_s
        self.blocklist = Blocklist(blocklist) if blocklist else None
        self.engine: Engine | None = None
        self.metrics = TextMetrics()

    def _alive(self) -> bool:
        return self.engine is not None and self.engine.alive

    async def _load_bundle(self, uri: str) -> None:
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
        """Raise RuntimeError if the engine has ended, and update the gauges.

        Ray Serve calls it every second. It is async because Ray Serve would call it on another
        thread otherwise.
        """
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
    ) -> tuple[str, list[Chunk]] | RequestError:
        try:
            reference = self.reference
            return reference, await self._submit(request, client).results()
        except RequestError as error:
            return error

    async def stream(
        self, request: CompletionRequest, client: str
    ) -> AsyncGenerator[tuple[str, Chunk] | RequestError, None]:
        try:
            reference = self.reference
            async with contextlib.aclosing(self._submit(request, client).chunks()) as chunks:
                async for chunk in chunks:
                    yield reference, chunk
        except RequestError as error:
            yield error

    def _submit(self, request: CompletionRequest, client: str) -> Generation:
        """Submit a request to the engine.

        Not async: no other bundle can be loaded between the choice of the engine and the submit.
        """
        assert self.engine is not None
        _check_model(request.model, self.reference)
        if request.timeout_s is not None and request.timeout_s > self.timeout_s:
            raise InvalidValue(
                f"timeout_s is {request.timeout_s:g}, and a request may take at most "
                f"{self.timeout_s:g} s here: use a lower value",
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
        except PromptBlocked:
            self.metrics.prompt_blocked(self.reference)
            raise


class ImageReplica(Replica):
    """Serves a GAN bundle, one request after the other.

    On a CPU, a batch of 32 images is only 10 to 20 % faster per image than single images.

    Args:
        threads: of ONNX Runtime.
        providers: as for `serve.session.ImageSession`.
    """

    session: ImageSession

    def __init__(self, threads: int, providers: list[str] | None = None) -> None:
        super().__init__()
        self.threads, self.providers = threads, providers
        self.waiting = 0  # requests, the running one included
        self.executor = ThreadPoolExecutor(1, "images")
        self.metrics = ImageMetrics()

    async def _load_bundle(self, uri: str) -> None:
        session = await asyncio.to_thread(
            open_bundle, ImageSession, uri, threads=self.threads, providers=self.providers
        )
        is_rollout = self.uri != ""
        self.uri, self.session = uri, session
        if is_rollout:
            self.metrics.rollouts.inc(1, {"model": _reference(self.session)})

    async def load(self) -> dict[str, int]:
        running = min(self.waiting, 1)
        return {"slots": 1, "running": running, "waiting": self.waiting - running}

    async def describe(self) -> Model:
        return _describe(self.session)

    async def generate(
        self, request: GenerationsRequest
    ) -> tuple[str, GeneratedImages] | RequestError:
        session = self.session
        try:
            _check_model(request.model, _reference(session))
            _check_size(session, request.size)
            label = _label(session, request)
            return await self._run(session, lambda: _generate(session, request, label))
        except RequestError as error:
            return error

    async def interpolate(
        self, request: InterpolationsRequest
    ) -> tuple[str, GeneratedImages] | RequestError:
        session = self.session
        try:
            _check_model(request.model, _reference(session))
            label = _label(session, request)
            return await self._run(session, lambda: _interpolate(session, request, label))
        except RequestError as error:
            return error

    async def _run(
        self, session: ImageSession, function: Callable[[], GeneratedImages]
    ) -> tuple[str, GeneratedImages]:
        """Run a request on the thread that runs all of them in turn."""
        if self.waiting >= QUEUE_LIMIT:
            raise Overloaded(f"{self.waiting} requests for images wait: try again in a moment")
        self.waiting += 1
        started = time.monotonic()
        try:
            images = await asyncio.get_running_loop().run_in_executor(self.executor, function)
        finally:
            self.waiting -= 1
        reference = _reference(session)
        self.metrics.request_ended(len(images.labels), time.monotonic() - started, reference)
        return reference, images


def _reference(session: TextSession | ImageSession) -> str:
    """Return name and version of a session's model, such as gpt/3."""
    return f"{session.manifest['name']}/{session.manifest['version']}"


def _check_model(requested: str | None, served: str) -> None:
    name = served.rpartition("/")[0]
    if requested not in (None, served, name):
        raise UnknownModel(f"model {requested!r} is not served here: leave it out, or use {name}")


def _describe(session: TextSession | ImageSession, **more: object) -> Model:
    manifest = session.manifest
    facts = {
        key: manifest[key]
        for key in ("version", "kind", "metrics", "model", "quantization", "dataset", "commit")
    }
    return Model.model_validate(
        {
            "id": manifest["name"],
            "created": bundle.created(manifest),
            "run": bundle.public_run(manifest),
            **facts,
            "providers": session.providers,
            "sample": session.sample is not None,
            **more,
        }
    )


def _generate(
    session: ImageSession, request: GenerationsRequest, label: int | None
) -> GeneratedImages:
    seed = random.randrange(2**31) if request.seed is None else request.seed
    images = session.generate_from_seed(seed, request.n, label, request.truncation)
    labels = session.labels(seed, request.n, label)
    columns = math.ceil(math.sqrt(request.n))
    return _as_files(session, request, images, labels, seed, columns)


def _interpolate(
    session: ImageSession, request: InterpolationsRequest, label: int | None
) -> GeneratedImages:
    images = session.interpolate(
        request.seed, request.to_seed, request.steps, label, request.truncation
    )
    labels = session.labels(request.seed, 1, label)
    return _as_files(
        session, request, images, labels and labels * request.steps, request.seed, request.steps
    )


def _as_files(
    session: ImageSession,
    request: ImageRequest,
    images: np.ndarray,
    labels: list[int] | None,
    seed: int,
    columns: int,
) -> GeneratedImages:
    """Encode images (N, H, W, C) as one PNG each, or as a single one with `columns` per row."""
    names = session.manifest["model"]["class_names"]
    one_file = request.response_format == "png"
    shown = [contact_sheet(images, columns)] if one_file else list(images)
    return GeneratedImages(
        [png(image) for image in shown],
        [None] * len(images) if labels is None else [names[label] for label in labels],
        seed,
    )


def _check_size(session: ImageSession, size: str | None) -> None:
    side = session.manifest["model"]["image_size"]
    if size not in (None, "auto", f"{side}x{side}"):
        raise InvalidValue(
            f"size is {size!r}, and this model generates {side}x{side}: leave it out", "size"
        )


def _label(session: ImageSession, request: ImageRequest) -> int | None:
    """Return the class that a request names by `label` or `prompt`; None: any class.

    Raises:
        InvalidValue: the model has no such class, or no classes.
    """
    param: str
    requested: int | str
    if request.label is None:
        param, requested = "prompt", request.prompt.strip()
    else:
        param, requested = "label", request.label
    if requested == "":
        return None
    names: list[str] = session.manifest["model"]["class_names"] or []
    if not names:
        raise InvalidValue(
            f"{param} is {requested!r}, and this model has no classes: leave it out", param
        )
    if isinstance(requested, int) and 0 <= requested < len(names):
        return requested
    if isinstance(requested, str):
        if requested in names:  # before names that differ only in case
            return names.index(requested)
        folded = [name.casefold() for name in names]
        if requested.casefold() in folded:
            return folded.index(requested.casefold())
    raise InvalidValue(
        f"{param} is {requested!r}, which is not a class of this model: "
        f"use one of {', '.join(names)}",
        param,
    )
