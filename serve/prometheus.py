"""The replicas' own metrics for Prometheus, beside Ray's, on each node's metrics port.

Ray prefixes every name with `ray_`, appends `_total` to counters, and tags deployment, replica and
application. Metrics of a model have the tag `model` as well, such as gpt/3. Everything is recorded
on the event loop, once per message or request (2 us each), never by the engine's thread.
"""

import contextlib
import time
from collections.abc import AsyncGenerator

from ray.serve.metrics import Counter, Gauge, Histogram

from serve.errors import RequestError
from serve.text.chunks import Chunk

TOKEN_S = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
REQUEST_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0]
MODEL = ("model",)


class TextMetrics:
    """Metrics of a `TextReplica`."""

    def __init__(self) -> None:
        self.requests = Counter(
            "raykiln_text_requests",
            "Requests for text that ended, by outcome: stop, length, content_filter, cancelled "
            "(the client disconnected), or the code of an error.",
            tag_keys=("model", "outcome"),  # type: ignore[arg-type]  # annotated as a tuple of one
        )
        self.prompt_tokens = Counter(
            "raykiln_prompt_tokens",
            "Tokens of the prompts whose first token was sent.",
            tag_keys=MODEL,
        )
        self.generation_tokens = Counter(
            "raykiln_generation_tokens", "Tokens generated and sent.", tag_keys=MODEL
        )
        self.time_to_first_token = Histogram(
            "raykiln_time_to_first_token_seconds",
            "From a request's arrival at the replica, queueing included.",
            REQUEST_S,
            MODEL,
        )
        self.inter_token_latency = Histogram(
            "raykiln_inter_token_latency_seconds",
            "Time between two messages of a stream per token of the second; a pause longer than "
            "the messages' interval counts in full.",
            TOKEN_S,
            MODEL,
        )
        self.filter_hits = Counter(
            "raykiln_filter_hits",
            "Prompts refused and texts ended because of a blocked phrase, by where it was found.",
            tag_keys=("model", "where"),  # type: ignore[arg-type]  # the same
        )
        self.rollouts = _rollouts()
        self.load = {
            "slots": Gauge("raykiln_slots", "Texts that the replica can generate at once."),
            "running": Gauge("raykiln_requests_running", "Texts that have a slot."),
            "waiting": Gauge("raykiln_requests_waiting", "Texts that wait for a slot."),
        }

    async def observe(
        self, chunks: AsyncGenerator[Chunk, None], n: int, model: str
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of a request for `n` texts unchanged, and record them."""
        tags, started = {"model": model}, time.monotonic()
        latest: dict[int, tuple[float, Chunk]] = {}  # by choice
        outcome = "cancelled"
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    now = time.monotonic()
                    if not latest:
                        self.time_to_first_token.observe(now - started, tags)
                        self.prompt_tokens.inc(chunk.prompt_tokens, tags)
                    new = chunk.completion_tokens
                    if chunk.choice in latest:
                        before, previous = latest[chunk.choice]
                        new -= previous.completion_tokens
                        self.inter_token_latency.observe((now - before) / new, tags)
                    self.generation_tokens.inc(new, tags)
                    latest[chunk.choice] = now, chunk
                    if chunk.finish_reason == "content_filter":
                        self.filter_hits.inc(1, {**tags, "where": "text"})
                    ended = len(latest) == n and all(
                        text.finish_reason for _, text in latest.values()
                    )
                    outcome = (ended and chunk.finish_reason) or "cancelled"
                    yield chunk
        except RequestError as error:
            outcome = error.code or "rejected"
            raise
        finally:
            self.requests.inc(1, {**tags, "outcome": outcome})

    def prompt_blocked(self, model: str) -> None:
        self.filter_hits.inc(1, {"model": model, "where": "prompt"})

    def set_load(self, status: dict[str, int]) -> None:
        for name, gauge in self.load.items():
            gauge.set(status[name])


class ImageMetrics:
    """Metrics of an `ImageReplica`."""

    def __init__(self) -> None:
        self.images = Counter("raykiln_images", "Images generated.", tag_keys=MODEL)
        self.seconds = Histogram(
            "raykiln_image_request_seconds",
            "A request for images, queueing included.",
            REQUEST_S,
            MODEL,
        )
        self.rollouts = _rollouts()

    def request_ended(self, images: int, seconds: float, model: str) -> None:
        self.seconds.observe(seconds, {"model": model})
        self.images.inc(images, {"model": model})


def _rollouts() -> Counter:
    return Counter("raykiln_rollouts", "Versions loaded into a running replica.", tag_keys=MODEL)
