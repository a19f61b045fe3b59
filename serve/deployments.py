"""The Ray Serve application: `Text` and `Pictures` (one model a replica), and the `Gateway` in front of both.

Which bundle a replica serves is its `user_config`: another version swaps in `reconfigure`, without a new process and without
a dropped request. `build` is what a Serve config file names as its import path.
"""

import asyncio
import contextlib
import functools
import io
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, Any, TypeVar

import numpy as np
import ray.exceptions
import ray.serve.exceptions
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.context import _get_global_client  # `serve.status()` doesn't tell the number of replicas that is aimed at
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve import access
from serve.blocklist import Blocklist
from serve.catalog import Catalog
from serve.engine import Chunk, Engine, Stream
from serve.errors import Blocked, Overloaded, Rejected, Unavailable, UnknownModel, WrongValue
from serve.ingress import Drawing, build_app
from serve.prometheus import PictureMetrics, TextMetrics
from serve.scheduler import Sampling
from serve.schemas import CompletionRequest, DeploymentStatus, ImagesRequest, InterpolationsRequest, Model, PictureRequest
from serve.session import ImageSession, TextSession, open_bundle

Answer = TypeVar("Answer")

QUEUE_LIMIT = 64  # requests that may wait at a replica; one more is refused with 429
DESCRIBE_TIMEOUT_S = 10.0
STATUS_TIMEOUT_S = 2.0
STATUS_AGE_S = 1.0  # every open page asks for it
HEALTH_CHECK_S = 1.0  # a replica whose engine has died refuses at once and so draws requests, until three checks have failed
UNREACHABLE = (TimeoutError, ray.exceptions.RayError, ray.serve.exceptions.RayServeException)  # a deployment, or a replica of it


# ---- a replica's model


def _reference(session: TextSession | ImageSession) -> str:
    return f"{session.manifest['name']}/{session.manifest['version']}"


def _check_model(requested: str | None, served: str) -> None:
    if requested not in (None, served, served.rpartition("/")[0]):
        raise UnknownModel(f"model {requested!r} is not served here: leave it out, or use {served.rpartition('/')[0]}")


def _describe(session: TextSession | ImageSession, **more: Any) -> Model:
    manifest = session.manifest
    facts = {key: manifest[key] for key in ("version", "kind", "metrics", "model", "quantization", "dataset", "commit")}
    facts["run"] = {key: manifest["run"][key] for key in ("name", "step")}  # where its storage is, is nobody's business
    created = int(datetime.fromisoformat(manifest["created"]).timestamp())
    return Model.model_validate(
        {"id": manifest["name"], "created": created, **facts, "providers": session.providers, "sample": session.sample is not None, **more}
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
        return self.session.manifest["name"], self.uri.removesuffix(place) if self.uri.endswith(place) else None


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
        self.slots, self.threads, self.timeout_s, self.providers = slots, threads, timeout_s, providers
        self.chunks_per_s, self.blocklist = chunks_per_s, Blocklist(blocklist) if blocklist else None
        self.engine: Engine | None = None
        self.metrics = TextMetrics()

    def _alive(self) -> bool:
        return self.engine is not None and self.engine.alive

    async def _swap(self, uri: str) -> None:
        session = await asyncio.to_thread(open_bundle, TextSession, uri, slots=self.slots, threads=self.threads, providers=self.providers)
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

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]] | Rejected:
        try:
            reference = self.reference
            return reference, await self._submit(request, client).results()
        except Rejected as error:
            return error

    async def stream(self, request: CompletionRequest, client: str) -> AsyncGenerator[tuple[str, Chunk] | Rejected, None]:
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
                f"timeout_s is {request.timeout_s:g}, and a request may take {self.timeout_s:g} s here: ask for no more", "timeout_s"
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
            return self.engine.submit(request.prompt, sampling, client, n=request.n, timeout_s=request.timeout_s)
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
        session = await asyncio.to_thread(open_bundle, ImageSession, uri, threads=self.threads, providers=self.providers)
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
        self, make: Callable[[ImageSession, Any, int | None], Drawing], session: ImageSession, request: PictureRequest, label: int | None
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
    return _drawing(session, request, images, session.labels(seed, request.n, label), seed, columns=math.ceil(math.sqrt(request.n)))


def _interpolate(session: ImageSession, request: InterpolationsRequest, label: int | None) -> Drawing:
    images = session.interpolation(request.seed, request.to_seed, request.steps, label, request.truncation)
    labels = session.labels(request.seed, 1, label)
    return _drawing(session, request, images, labels and labels * request.steps, request.seed, columns=request.steps)


def _drawing(
    session: ImageSession, request: PictureRequest, images: np.ndarray, labels: list[int] | None, seed: int, columns: int
) -> Drawing:
    """Pictures (N, H, W, C) as PNG files, or as one of `columns` pictures a row, with the name of each one's class."""
    names = session.manifest["model"]["class_names"]
    shown = images if request.response_format == "b64_json" else [_sheet(images, columns)]
    return Drawing([_png(image) for image in shown], [None] * len(images) if labels is None else [names[label] for label in labels], seed)


def _sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures (N, H, W, C) side by side in rows of `columns`, (rows x H, columns x W, C); what is left over is white."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:count] = images
    return cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def _png(image: np.ndarray) -> bytes:
    """A (H, W, C) uint8 picture as a PNG file, grey where C is 1."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def _check_size(session: ImageSession, size: str | None) -> None:
    side = session.manifest["model"]["image_size"]
    if size not in (None, "auto", f"{side}x{side}"):
        raise WrongValue(f"size is {size!r}, and this model draws {side}x{side}: leave it out", "size")


def _label(session: ImageSession, request: PictureRequest) -> int | None:
    """The class that a request asks for, by `label` or by its prompt; None: any.

    Raises:
        WrongValue: the model has no such class, or none at all.
    """
    wanted, param = (request.prompt.strip(), "prompt") if request.label is None else (request.label, "label")
    if wanted == "":
        return None
    names: list[str] = session.manifest["model"]["class_names"] or []
    if not names:
        raise WrongValue(f"{param} is {wanted!r}, and this model has no classes: leave it out", param)
    if isinstance(wanted, int) and 0 <= wanted < len(names):
        return wanted
    if wanted in names:  # before any that differs in case alone
        return names.index(str(wanted))
    folded = [name.casefold() for name in names]
    if isinstance(wanted, str) and wanted.casefold() in folded:
        return folded.index(wanted.casefold())
    raise WrongValue(f"{param} is {wanted!r}, which is no class of this model: use one of {', '.join(names)}", param)


# ---- the gateway


@contextlib.contextmanager
def _reaching(model: str) -> Iterator[None]:
    """Turns what Ray raises where a deployment cannot be reached into an answer for the client."""
    try:
        yield
    except (ray.exceptions.RayActorError, ray.serve.exceptions.DeploymentUnavailableError, TimeoutError) as error:
        raise Unavailable(f"the {model} model does not answer just now: try again in a moment") from error
    except ray.serve.exceptions.BackPressureError as error:
        raise Overloaded(f"too many requests wait for the {model} model: try again in a moment") from error


def _kept(answer: Answer | Rejected) -> Answer:
    if isinstance(answer, Rejected):
        raise answer
    return answer


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
    """The `Text` deployment (`serve.ingress.TextModel`)."""

    name = "text"

    def __init__(self, handle: DeploymentHandle) -> None:
        super().__init__(handle)
        self.streaming = handle.options(stream=True)

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]]:
        with _reaching(self.name):
            return _kept(await self.handle.complete.remote(request, client))

    async def stream(self, request: CompletionRequest, client: str) -> AsyncGenerator[tuple[str, Chunk], None]:
        answers = self.streaming.stream.remote(request, client)
        assert isinstance(answers, DeploymentResponseGenerator)
        unfinished = request.n
        try:
            with _reaching(self.name):
                async for answer in answers:
                    reference, chunk = _kept(answer)
                    unfinished -= chunk.finish_reason is not None
                    yield reference, chunk
        finally:
            if unfinished:
                answers.cancel()  # a message of its own to the replica, whether that has ended or not


class RemotePictures(Remote):
    """The `Pictures` deployment (`serve.ingress.ImageModel`)."""

    name = "picture"

    async def draw(self, request: ImagesRequest) -> tuple[str, Drawing]:
        with _reaching(self.name):
            return _kept(await self.handle.draw.remote(request))

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, Drawing]:
        with _reaching(self.name):
            return _kept(await self.handle.interpolate.remote(request))


class ServeCluster:
    """The deployments as the ingress sees them (`serve.ingress.Cluster`).

    Args:
        handles: by deployment, of those whose replicas tell their load.
    """

    def __init__(self, handles: dict[str, DeploymentHandle]) -> None:
        self.handles = handles
        self.lock, self.seen, self.seen_at = asyncio.Lock(), dict[str, DeploymentStatus](), -STATUS_AGE_S

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
            raise Unavailable("Serve's controller does not answer just now: try again in a moment") from error
        deployments = details["applications"][application]["deployments"]
        loads = await asyncio.gather(*(self._load(name) for name in deployments))
        return {name: _deployment_status(found, load) for (name, found), load in zip(deployments.items(), loads, strict=True)}

    async def _load(self, name: str) -> dict[str, int | None]:
        """Summed over the replicas that answer; nothing where none does, or where one keeps the others waiting."""
        loads: list[Any] = []
        if name in self.handles:
            with contextlib.suppress(*UNREACHABLE):
                broadcast = self.handles[name].broadcast("load")
                loads = await broadcast.results_async(timeout_s=STATUS_TIMEOUT_S, return_exceptions=True)
        answers = [load for load in loads if isinstance(load, dict)]
        return {key: sum(answer[key] for answer in answers) if answers else None for key in ("slots", "running", "waiting")}


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
        self.cluster = ServeCluster({handle.deployment_name: handle for handle in (text, images) if handle is not None})
        access.to_stdout()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.text, self.images, self.cluster, Catalog(), gives_request_id_back=False)  # Serve's proxy does


# ---- the application


class Options(BaseModel):
    """What an application consists of. The bundles are not named here, but in the deployments' `user_config`."""

    model_config = ConfigDict(extra="forbid")

    text: bool = True
    images: bool = True
    slots: int = 8  # texts that a replica writes at once
    threads: int = 1  # of ONNX Runtime, and CPUs that a replica reserves; more than one slows tiny models down
    providers: list[str] | None = None  # of models.runtime.PROVIDERS, best first; None: the best that a replica's machine has
    max_replicas: int = 4  # of each model
    timeout_s: float = 300.0  # of a text, its waiting included
    blocklist: list[Annotated[str, Field(pattern=r"\S")]] = []  # phrases that no prompt and no text may have (`serve.blocklist`)
    chunks_per_s: float = Field(default=100.0, gt=0)  # see `serve.engine.Engine`: each costs proxy, gateway and replica 1 to 2 ms of CPU


def build(options: Options) -> serve.Application:
    """What a Serve config names: `import_path: serve.deployments:build`, `args: {...Options...}`."""
    text = images = None
    if options.text:
        text = _model(Text, options, target_ongoing_requests=options.slots).bind(
            options.slots, options.threads, options.timeout_s, options.providers, options.chunks_per_s, options.blocklist
        )
    if options.images:
        images = _model(Pictures, options, target_ongoing_requests=4).bind(options.threads, options.providers)
    gateway = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000, graceful_shutdown_wait_loop_s=0.5)
    return gateway(Gateway).bind(text, images)


def _model(replica: type, options: Options, target_ongoing_requests: float) -> serve.Deployment:
    return serve.deployment(
        # Serve's own preset: up after 30 s of load, down after 10 minutes without. Its delays are no shorter than its look-back,
        # so that the count does not swing.
        num_replicas="auto",
        autoscaling_config={"max_replicas": options.max_replicas, "target_ongoing_requests": target_ongoing_requests},
        ray_actor_options={"num_cpus": options.threads},
        # Twice what a replica holds: replicas queue and refuse by themselves. Were Serve's limit the lower one, its routers would
        # queue, without bound or fairness; and their default back-off of up to half a second halves the throughput at saturation.
        max_ongoing_requests=2 * (options.slots + QUEUE_LIMIT),
        request_router_config={"initial_backoff_s": 0.005, "backoff_multiplier": 1.5, "max_backoff_s": 0.02},
        health_check_period_s=HEALTH_CHECK_S,
        max_constructor_retry_count=3,  # a bundle that cannot be loaded will not become loadable
        graceful_shutdown_wait_loop_s=0.5,
    )(replica)
