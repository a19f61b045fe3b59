"""What is recorded of a request, with recorders in place of Ray's metrics.

tests/test_serve/test_observability.py checks that Ray exports them.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve.errors import DeadlineExceeded, RequestError
from serve.prometheus import TextMetrics
from serve.text.chunks import Chunk


class Recorder:
    """Stands in for a counter, a gauge or a histogram."""

    def __init__(self) -> None:
        self.recorded: list[tuple[float, dict[str, str] | None]] = []

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.recorded.append((value, tags))

    observe = set = inc

    @property
    def values(self) -> list[float]:
        return [value for value, _ in self.recorded]


def recorded_text() -> Any:
    metrics: Any = TextMetrics()
    for name in (
        "requests",
        "prompt_tokens",
        "generation_tokens",
        "time_to_first_token",
        "inter_token_latency",
        "filter_hits",
    ):
        setattr(metrics, name, Recorder())
    metrics.load = {name: Recorder() for name in metrics.load}
    return metrics


async def chunks(*made: Chunk | RequestError, pause_s: float = 0.0) -> AsyncGenerator[Chunk, None]:
    for item in made:
        await asyncio.sleep(pause_s)
        if isinstance(item, RequestError):
            raise item
        yield item


def test_text_records_its_tokens_and_latencies() -> None:
    metrics = recorded_text()
    made = [Chunk("a", 7, 1), Chunk("bc", 7, 3), Chunk("d", 7, 4, "length")]

    async def go() -> list[Chunk]:
        return [
            chunk async for chunk in metrics.observe(chunks(*made, pause_s=0.02), 1, model="gpt/3")
        ]

    assert asyncio.run(go()) == made
    assert metrics.prompt_tokens.recorded == [(7, {"model": "gpt/3"})]
    assert metrics.generation_tokens.values == [1, 2, 1]
    (first,), (second, third) = (
        metrics.time_to_first_token.values,
        metrics.inter_token_latency.values,
    )
    assert first >= 0.019
    assert second >= 0.0095, "two tokens in one message: half the time for each"
    assert third >= 0.019
    assert metrics.requests.recorded == [(1, {"model": "gpt/3", "outcome": "length"})]


@pytest.mark.parametrize(("stays", "outcome"), [(True, "stop"), (False, "cancelled")])
def test_several_texts_count_as_one_request(stays: bool, outcome: str) -> None:
    metrics = recorded_text()
    made = [
        Chunk("a", 7, 1, choice=0),
        Chunk("b", 7, 2, "length", choice=1),
        Chunk("c", 7, 5, choice=0),
        Chunk("d", 7, 6, "stop", choice=0),
    ]

    async def go() -> None:
        async for _ in metrics.observe(chunks(*(made if stays else made[:3])), 2, model="gpt/3"):
            pass

    asyncio.run(go())
    assert metrics.prompt_tokens.values == [7]
    assert metrics.generation_tokens.values == ([1, 2, 4, 1] if stays else [1, 2, 4])
    assert len(metrics.inter_token_latency.values) == (2 if stays else 1), (
        "latencies are recorded per text"
    )
    assert metrics.requests.recorded == [(1, {"model": "gpt/3", "outcome": outcome})]


def test_disconnect_before_a_text_starts_is_cancelled() -> None:
    metrics = recorded_text()

    async def go() -> None:
        async with contextlib.aclosing(
            metrics.observe(
                chunks(Chunk("a", 7, 1, "stop"), Chunk("b", 7, 1, choice=1)), 2, model="gpt/3"
            )
        ) as texts:
            await anext(texts)

    asyncio.run(go())
    assert metrics.requests.recorded == [(1, {"model": "gpt/3", "outcome": "cancelled"})]


def test_disconnect_is_cancelled_and_ends_the_text() -> None:
    metrics, ended = recorded_text(), False

    async def endless() -> AsyncGenerator[Chunk, None]:
        nonlocal ended
        try:
            for count in range(1, 1000):
                yield Chunk("a", 1, count)
        finally:
            ended = True

    async def go() -> None:
        async with contextlib.aclosing(metrics.observe(endless(), 1, model="gpt/3")) as text:
            await anext(text)

    asyncio.run(go())
    assert ended
    assert metrics.requests.recorded == [(1, {"model": "gpt/3", "outcome": "cancelled"})]


def test_error_is_recorded_by_its_code() -> None:
    metrics = recorded_text()

    async def go() -> None:
        async for _ in metrics.observe(
            chunks(Chunk("a", 1, 1), DeadlineExceeded("late")), 1, model="gpt/3"
        ):
            pass

    with pytest.raises(DeadlineExceeded, match="late"):
        asyncio.run(go())
    assert metrics.requests.recorded == [(1, {"model": "gpt/3", "outcome": "deadline_exceeded"})]


def test_blocklist_hits_are_counted() -> None:
    metrics = recorded_text()

    async def go() -> None:
        async for _ in metrics.observe(
            chunks(Chunk("a", 1, 1), Chunk("", 1, 4, "content_filter")), 1, model="gpt/3"
        ):
            pass

    asyncio.run(go())
    metrics.prompt_blocked("gpt/3")
    assert metrics.filter_hits.recorded == [
        (1, {"model": "gpt/3", "where": "text"}),
        (1, {"model": "gpt/3", "where": "prompt"}),
    ]
    assert metrics.requests.recorded == [(1, {"model": "gpt/3", "outcome": "content_filter"})]


def test_load_is_the_engines_status() -> None:
    metrics = recorded_text()
    metrics.set_load({"slots": 8, "running": 3, "waiting": 2, "generated": 999})
    assert {name: gauge.values for name, gauge in metrics.load.items()} == {
        "slots": [8],
        "running": [3],
        "waiting": [2],
    }
