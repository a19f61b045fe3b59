"""The engine: same tokens alone and in a batch, streams that add up, slots that are freed."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    GenerationFailed,
    Overloaded,
    RequestError,
    Unavailable,
)
from serve.text.chunks import Chunk
from serve.text.detokenize import token_text
from serve.text.engine import Engine
from serve.text.generation import Generation
from serve.text.sampling import Sampling, penalize, sample
from tests.support.sessions import EOS, HashSession, byte_tokenizer, logits_after


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def until_released_again(session: HashSession) -> None:
    before = session.released
    await until(lambda: session.released > before)


@contextlib.asynccontextmanager
async def engine_of(session: HashSession, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(session, **options)
    try:
        yield engine
    finally:
        engine.close()
        await asyncio.to_thread(engine.join, 20)
        assert engine.status()["running"] == engine.status()["waiting"] == 0


async def whole(generation: Generation) -> Chunk:
    """Return the result of a request for one text."""
    (chunk,) = await generation.results()
    return chunk


def reference_tokens(prompt: str, sampling: Sampling) -> list[int]:
    """Return the tokens of a request, computed without scheduler, chunks, slots or streams."""
    tokenizer = byte_tokenizer()
    history = tokenizer.encode(prompt).ids or [EOS]
    tokens: list[int] = []
    while len(tokens) < sampling.max_tokens and EOS not in tokens:
        if any(stop in tokenizer.decode(tokens) for stop in sampling.stop):
            break
        logits = penalize(
            logits_after(history + tokens),
            history,
            tokens,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
        )
        parameters = {
            name: getattr(sampling, name)
            for name in ("temperature", "top_k", "top_p", "seed", "choice")
        }
        tokens.append(sample(logits, position=len(tokens), **parameters))
    return tokens


def reference(prompt: str, sampling: Sampling) -> str:
    """Return the text of a request, computed in the same way."""
    text = byte_tokenizer().decode(reference_tokens(prompt, sampling))
    return text[
        : min((text.find(stop) for stop in sampling.stop if stop in text), default=len(text))
    ]


REQUESTS = [
    ("To be", Sampling(max_tokens=30, temperature=0)),
    ("", Sampling(max_tokens=25, temperature=0.7, seed=3)),
    ("O " * 20, Sampling(max_tokens=12, temperature=1.0, top_k=0, top_p=0.9, seed=4)),
    ("é€😀", Sampling(max_tokens=1, temperature=0.7, seed=5)),
    ("To be", Sampling(max_tokens=30, temperature=0.7, seed=6, stop=("a", "Q"))),
    ("x", Sampling(max_tokens=40, temperature=1.5, top_k=5, seed=7)),
    ("To be", Sampling(max_tokens=30, temperature=0)),
]


def test_text_is_same_alone_and_in_batch() -> None:
    expected = [reference(*request) for request in REQUESTS]

    async def scenario() -> None:
        session = HashSession(slots=3)
        async with engine_of(session, chunk_size=8) as engine:
            alone = [(await whole(engine.submit(*request))).text for request in REQUESTS]
            assert session.largest_batch == 1
            assert alone == expected
            results = await asyncio.gather(
                *(whole(engine.submit(*request)) for request in REQUESTS)
            )
            assert [result.text for result in results] == expected
            assert session.largest_batch == 3
            assert max(session.prefill_sizes) == 8

    run(scenario)


@dataclass
class Visit:
    """One client's request, and when the client connects and disconnects.

    Attributes:
        arrives: after the engine has generated this many tokens.
        leaves: after it has received this many tokens; None: it stays to the end.
        received: by choice.
    """

    arrives: int
    prompt: str
    sampling: Sampling
    n: int
    leaves: int | None
    received: dict[int, Chunk] = field(default_factory=dict)

    async def listen(self, generation: Generation) -> None:
        async with contextlib.aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                before = self.received.get(chunk.choice)
                self.received[chunk.choice] = chunk if before is None else before + chunk
                if (
                    self.leaves is not None
                    and sum(one.completion_tokens for one in self.received.values()) >= self.leaves
                ):
                    return

    async def run(self, engine: Engine) -> None:
        listening = asyncio.create_task(
            self.listen(engine.submit(self.prompt, self.sampling, n=self.n))
        )
        if self.leaves == 0:
            await asyncio.sleep(0)
            listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening

    def check(self) -> None:
        """Check that the client received a prefix of the reference, or all of it if it stayed."""
        tokenizer = byte_tokenizer()
        for choice in range(self.n):
            sampling = replace(self.sampling, choice=choice)
            text = reference(self.prompt, sampling)
            tokens = [
                token_text(tokenizer, token) for token in reference_tokens(self.prompt, sampling)
            ]
            chunk = self.received.get(choice)
            if self.leaves is None:
                assert chunk is not None
                assert (chunk.text, chunk.completion_tokens) == (text, len(tokens))
            if chunk is not None:
                assert text.startswith(chunk.text)
                logged = [logprob.token for logprob in chunk.logprobs]
                assert logged == tokens[: chunk.completion_tokens]


STEM = "O Romeo, Romeo! wherefore"


visits = st.builds(
    Visit,
    arrives=st.integers(0, 80),
    prompt=st.one_of(st.integers(0, len(STEM)).map(lambda size: STEM[:size]), st.text(max_size=8)),
    sampling=st.builds(
        Sampling,
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 3),
        stop=st.sampled_from([(), ("a", "QQ")]),
        logprobs=st.just(1),
    ),
    n=st.integers(1, 3),
    leaves=st.none() | st.integers(0, 8),
    received=st.builds(dict),
)


@settings(max_examples=40, deadline=None)
@given(plan=st.lists(visits, min_size=1, max_size=10), slots=st.integers(1, 4))
def test_every_client_gets_its_tokens_whoever_connects_or_disconnects(
    plan: list[Visit], slots: int
) -> None:
    async def scenario() -> None:
        async with engine_of(HashSession(slots=slots), chunk_size=4, interval_s=0) as engine:
            running: list[asyncio.Task[None]] = []
            for visit in sorted(plan, key=lambda visit: visit.arrives):
                while engine.generated < visit.arrives and not all(task.done() for task in running):
                    await asyncio.sleep(0.0005)
                running.append(asyncio.create_task(visit.run(engine)))
            await asyncio.gather(*running)

    run(scenario)
    for visit in plan:
        visit.check()


def test_stream_joins_to_whole_text_and_counts_tokens() -> None:
    async def scenario() -> None:
        async with engine_of(HashSession(step_s=0.001), interval_s=0.005) as engine:
            prompt, sampling = REQUESTS[0]
            chunks = [chunk async for chunk in engine.submit(prompt, sampling).chunks()]
            assert (
                "".join(chunk.text for chunk in chunks)
                == (await whole(engine.submit(prompt, sampling))).text
            )
            assert 1 < len(chunks) < 30, "tokens that are ready together are in one chunk"
            assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1] == Chunk(chunks[-1].text, 5, 30, "length")

    run(scenario)


def test_pause_between_chunks_grows_with_number_of_streams() -> None:
    async def scenario() -> None:
        async with engine_of(
            HashSession(slots=5, context=4000, step_s=0.002), interval_s=0.01, chunks_per_s=20
        ) as engine:
            not_streamed = asyncio.create_task(
                engine.submit("To be", Sampling(max_tokens=3000, temperature=0)).results()
            )
            async with contextlib.AsyncExitStack() as stack:
                for started, pause_s in enumerate((0.05, 0.1, 0.15, 0.2)):
                    stream = engine.submit("To be", Sampling(max_tokens=3000, temperature=0))
                    chunks = await stack.enter_async_context(contextlib.aclosing(stream.chunks()))
                    assert engine.pace.streaming == started
                    assert (await anext(chunks)).completion_tokens >= 1, (
                        "the first chunk comes at once all the same"
                    )
                    assert (await anext(chunks)).completion_tokens >= 2
                    assert engine.pace.pause_s() == pause_s
                engine.pace.streaming += 400
                assert engine.pace.pause_s() == 0.2, "longer pauses would look like stutter"
                engine.pace.streaming -= 400
            assert engine.pace.streaming == 0
            several = engine.submit("To be", Sampling(max_tokens=3000, temperature=0), n=9)
            async with contextlib.aclosing(several.chunks()) as chunks:
                async for chunk in chunks:
                    if chunk.completion_tokens > 100:
                        break
                assert 4 <= engine.pace.streaming <= 5, "only texts that have a slot"
            assert engine.pace.streaming == 0
            assert engine.pace.pause_s() == 0.01
            not_streamed.cancel()

    run(scenario)


def test_disconnect_frees_slot_within_one_token() -> None:
    async def scenario() -> None:
        async with engine_of(
            HashSession(slots=1, context=4000, step_s=0.002), interval_s=0
        ) as engine:
            stream = engine.submit("To be", Sampling(max_tokens=3000, temperature=0))
            async with contextlib.aclosing(stream.chunks()) as chunks:
                async for chunk in chunks:
                    if chunk.completion_tokens >= 5:
                        break
            seen = len(stream.sequences[0].tokens)
            follower = engine.submit("x", Sampling(max_tokens=1, temperature=0))
            await whole(follower)
            assert len(stream.sequences[0].tokens) <= seen + 1

    run(scenario)


def test_common_prefix_is_computed_once_and_texts_stay_the_same() -> None:
    async def scenario() -> None:
        session, stem = HashSession(slots=3), "O " * 20
        requests = [
            (stem + end, Sampling(max_tokens=5, seed=seed))
            for seed, end in enumerate(["", "x", "yz"])
        ]
        async with engine_of(session, chunk_size=8) as engine:
            answers = await asyncio.gather(
                *(whole(engine.submit(*request)) for request in requests)
            )
            assert [answer.text for answer in answers] == [
                reference(*request) for request in requests
            ]
            assert sum(session.prefill_sizes) == 40 + 1 + 2

    run(scenario)


def test_several_texts_are_one_request() -> None:
    async def scenario() -> None:
        session = HashSession(slots=2, context=4000, step_s=0.002)
        observed: list[int] = []

        def observe(chunks: AsyncGenerator[Chunk, None], n: int) -> AsyncGenerator[Chunk, None]:
            observed.append(n)
            return chunks

        async with engine_of(session, queue_limit=2, observe=observe) as engine:
            sampling = Sampling(max_tokens=20, temperature=1.0, seed=3)
            answers = await engine.submit("To be", sampling, n=3).results()
            expected = [reference("To be", replace(sampling, choice=choice)) for choice in range(3)]
            assert [(answer.choice, answer.text) for answer in answers] == list(enumerate(expected))
            assert len(set(expected)) == 3
            assert observed == [3]
            with pytest.raises(Overloaded):
                await engine.submit("x", sampling, n=5).results()
            assert engine.status()["running"] + engine.status()["waiting"] == 0
            stream = engine.submit("To be", replace(sampling, max_tokens=3000), n=3)
            async with contextlib.aclosing(stream.chunks()) as chunks:
                await anext(chunks)
            await until(lambda: engine.status()["running"] + engine.status()["waiting"] == 0)

    run(scenario)


def test_request_timeout_cannot_exceed_the_engines() -> None:
    async def scenario() -> None:
        async with engine_of(HashSession(context=4000, step_s=0.002), timeout_s=1e6) as engine:
            with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 s"):
                await engine.submit(
                    "x", Sampling(max_tokens=3000, temperature=0), n=2, timeout_s=0.05
                ).results()
            assert engine.submit("x", Sampling(max_tokens=1), timeout_s=2e6).timeout_s == 1e6

    run(scenario)


def test_queue_is_bounded_and_deadline_includes_waiting() -> None:
    async def scenario() -> None:
        async with engine_of(
            HashSession(slots=1, context=4000, step_s=0.002), queue_limit=1, timeout_s=0.2
        ) as engine:
            results = [
                asyncio.create_task(
                    whole(engine.submit("x", Sampling(max_tokens=3000, temperature=0)))
                )
                for _ in range(3)
            ]
            await asyncio.wait(results)
            errors = [result.exception() for result in results]
            assert [type(error) for error in errors] == [
                DeadlineExceeded,
                DeadlineExceeded,
                Overloaded,
            ]
            assert "0.2 s" in str(errors[0])

    run(scenario)


def test_client_with_few_requests_gets_into_a_full_queue() -> None:
    async def scenario() -> None:
        async with engine_of(HashSession(slots=1, step_s=0.002), queue_limit=2) as engine:
            sampling = Sampling(max_tokens=20, temperature=0)
            streams = [
                engine.submit("To be", sampling, client)
                for client in ("greedy", "greedy", "greedy", "modest")
            ]
            answers = await asyncio.gather(
                *(whole(stream) for stream in streams), return_exceptions=True
            )
            refused = answers.pop(2)
            assert isinstance(refused, Overloaded)
            assert "the 1 slots are in use and 2 more texts wait" in str(refused)
            assert {answer.text for answer in answers if isinstance(answer, Chunk)} == {
                reference("To be", sampling)
            }
            assert all(isinstance(answer, Chunk) for answer in answers)

    run(scenario)


def test_started_request_is_not_evicted_by_later_ones() -> None:
    async def scenario() -> None:
        async with engine_of(
            HashSession(slots=2, context=4000, step_s=0.002), queue_limit=2
        ) as engine:
            sampling = Sampling(max_tokens=60, temperature=1.0, seed=3)
            started = asyncio.create_task(engine.submit("To be", sampling, "greedy", n=4).results())
            await until(lambda: engine.status()["running"] == engine.status()["waiting"] == 2)
            with pytest.raises(Overloaded):
                await engine.submit("x", sampling, "modest").results()
            expected = [reference("To be", replace(sampling, choice=choice)) for choice in range(4)]
            assert [text.text for text in await started] == expected

    run(scenario)


def test_failed_request_does_not_affect_others(caplog: pytest.LogCaptureFixture) -> None:
    class NanSession(HashSession):
        """Gives NaN after an exclamation mark, and in all later uses of the slot, until cleared.

        A NaN in a masked position of the KV cache has the same effect.
        """

        def __init__(self) -> None:
            super().__init__(slots=4)
            self.nan_slots: set[int] = set()
            (self.trigger,) = self.tokenizer.encode("!").ids

        def _logits(self, slot: int, logits: np.ndarray) -> np.ndarray:
            if self.trigger in self.cache[slot]:
                self.nan_slots.add(slot)
            return np.full_like(logits, np.nan) if slot in self.nan_slots else logits

        def prefill(self, slot: int, ids: list[int], start: int = 0) -> np.ndarray:
            return self._logits(slot, super().prefill(slot, ids, start))

        def decode(self, slots: list[int], ids: list[int], lengths: list[int]) -> np.ndarray:
            return np.stack(
                [
                    self._logits(slot, row)
                    for slot, row in zip(slots, super().decode(slots, ids, lengths), strict=True)
                ]
            )

        def clear(self, slot: int) -> None:
            super().clear(slot)
            self.nan_slots.remove(slot)

    async def scenario() -> None:
        session = NanSession()
        stem, sampling = "O " * 10, Sampling(max_tokens=20, temperature=0.0, stop=("!",))
        async with engine_of(session, chunk_size=8) as engine:
            for variant in (sampling, replace(sampling, temperature=0.7)):
                streams = [
                    engine.submit(stem + "!", variant, n=2),
                    *(engine.submit(stem + end, variant) for end in ("x", "y")),
                ]
                failed, *answers = await asyncio.gather(
                    *(stream.results() for stream in streams), return_exceptions=True
                )
                assert isinstance(failed, GenerationFailed)
                assert (failed.status, failed.code) == (500, "internal_error")
                assert [answer[0].text for answer in answers if isinstance(answer, list)] == [
                    reference(stem + end, variant) for end in ("x", "y")
                ]
            again = await asyncio.gather(
                *(whole(engine.submit(stem + "x", sampling)) for _ in range(4))
            )
            assert {text.text for text in again} == {reference(stem + "x", sampling)}, (
                "all slots were cleared"
            )

    run(scenario)
    assert "the highest logit is nan" in caplog.text


def test_idle_engine_keeps_prefix_cache_if_no_memory_can_be_released() -> None:
    class Small(HashSession):
        def release(self) -> bool:
            self.released += 1
            return False

    async def scenario() -> None:
        session = Small(slots=1)
        async with engine_of(session, idle_s=0.01, chunk_size=8) as engine:
            prompt, sampling = REQUESTS[2]
            for _ in range(2):
                assert (await whole(engine.submit(prompt, sampling))).text == reference(
                    prompt, sampling
                )
                await until_released_again(session)
            assert sum(session.prefill_sizes) == len(prompt) + 8

    run(scenario)


def test_idle_engine_releases_memory_of_kv_cache() -> None:
    async def scenario() -> None:
        session = HashSession(slots=1)
        async with engine_of(session, idle_s=0.01, chunk_size=8) as engine:
            await until(lambda: session.released >= 1)
            prompt, sampling = REQUESTS[2]
            for _ in range(2):  # the second must not use the released cache
                assert (await whole(engine.submit(prompt, sampling))).text == reference(
                    prompt, sampling
                )
                await until_released_again(session)
                await until(lambda: session.cache == [[]])

    run(scenario)


def test_length_is_checked_before_anything_is_computed() -> None:
    async def scenario() -> None:
        session = HashSession(context=96)
        async with engine_of(session) as engine:
            assert (
                await whole(engine.submit("x" * 80, Sampling(max_tokens=16)))
            ).prompt_tokens == 80
            before = list(session.prefill_sizes)
            with pytest.raises(
                ContextLengthExceeded,
                match="81 tokens and max_tokens 16 exceed the model's context of 96",
            ):
                engine.submit("x" * 81, Sampling(max_tokens=16))
            with pytest.raises(ContextLengthExceeded):
                engine.submit("x" * 50_000_000, Sampling(max_tokens=16))
            assert session.prefill_sizes == before

    run(scenario)


def test_close_finishes_running_requests() -> None:
    async def scenario() -> None:
        engine = Engine(HashSession(slots=1, step_s=0.002))
        prompt, sampling = REQUESTS[0]
        results = [asyncio.create_task(whole(engine.submit(prompt, sampling))) for _ in range(2)]
        await until(lambda: engine.status()["running"] == 1)
        engine.close()
        assert {(await result).text for result in results} == {reference(prompt, sampling)}
        await until(lambda: not engine.alive)
        with pytest.raises(Unavailable):
            engine.submit(prompt, sampling)

    run(scenario)


def test_broken_session_fails_its_requests() -> None:
    class Broken(HashSession):
        def decode(self, slots: list[int], ids: list[int], lengths: list[int]) -> np.ndarray:
            raise RuntimeError("out of memory")

    async def scenario() -> None:
        engine = Engine(Broken(slots=1))
        streams = [engine.submit("x", Sampling(max_tokens=9)) for _ in range(2)]
        for stream in streams:
            with pytest.raises(RequestError, match="restarting"):
                await whole(stream)
        assert not engine.alive
        await asyncio.to_thread(engine.join, 20)

    run(scenario)
