"""The engine: the same tokens alone and in company, streams that add up, slots that come back, whole characters only."""

import asyncio
import contextlib
import hashlib
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve.detokenize import TextStream, spelled
from serve.engine import Chunk, Engine, Stream
from serve.errors import DeadlineExceeded, Failed, Overloaded, Rejected, TooLong, Unavailable
from serve.sampling import penalize, sample
from serve.scheduler import Prefill, Sampling, Scheduler, Sequence

EOS = 256
VOCAB = 257


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE without merges: one token a byte, and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def logits_after(history: list[int]) -> np.ndarray:
    """A deterministic model: the next token's logits depend on every token before it, and on their order."""
    digest = hashlib.sha256(np.array(history, np.int32).tobytes()).digest()
    return np.random.default_rng(list(digest)).standard_normal(VOCAB).astype(np.float32) * 3


class HashSession:
    """A session whose slots hold plain lists: whoever mixes up slots, lengths or the order of steps gets other tokens."""

    def __init__(self, slots: int = 3, context: int = 96, step_s: float = 0.0) -> None:
        self.slots, self.context, self.eos_token_id, self.step_s = slots, context, EOS, step_s
        self.tokenizer = byte_tokenizer()
        self.copies = True
        self.cache: list[list[int]] = [[] for _ in range(slots)]
        self.largest_batch = self.released = 0
        self.prefill_sizes: list[int] = []

    def prefill(self, slot: int, ids: list[int], start: int = 0) -> np.ndarray:
        assert start <= len(self.cache[slot])
        self.cache[slot] = self.cache[slot][:start] + ids
        self.prefill_sizes.append(len(ids))
        return logits_after(self.cache[slot])

    def decode(self, slots: list[int], ids: list[int], lengths: list[int]) -> np.ndarray:
        assert len(set(slots)) == len(slots)
        time.sleep(self.step_s)
        self.largest_batch = max(self.largest_batch, len(slots))
        for slot, token, length in zip(slots, ids, lengths, strict=True):
            assert len(self.cache[slot]) == length
            self.cache[slot].append(token)
        return np.stack([logits_after(self.cache[slot]) for slot in slots])

    def copy(self, source: int, target: int, tokens: int) -> None:
        assert tokens <= len(self.cache[source])
        self.cache[target] = self.cache[source][:tokens]

    def clear(self, slot: int) -> None:
        self.cache[slot] = []

    def release(self) -> bool:
        self.cache = [[] for _ in range(self.slots)]
        self.released += 1
        return True


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def engine_of(session: HashSession, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(session, **options)
    try:
        yield engine
    finally:
        engine.close()
        await asyncio.to_thread(engine.join, 20)
        assert engine.status()["running"] == engine.status()["waiting"] == 0


async def whole(stream: Stream) -> Chunk:
    """The answer of a request for one text."""
    (chunk,) = await stream.results()
    return chunk


def reference_tokens(prompt: str, sampling: Sampling) -> list[int]:
    """The tokens of a request, worked out without scheduler, chunks, slots or streams."""
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
        how = {
            name: getattr(sampling, name)
            for name in ("temperature", "top_k", "top_p", "seed", "choice")
        }
        tokens.append(sample(logits, position=len(tokens), **how))
    return tokens


def reference(prompt: str, sampling: Sampling) -> str:
    """The text of a request."""
    text = byte_tokenizer().decode(reference_tokens(prompt, sampling))
    return text[
        : min((text.find(stop) for stop in sampling.stop if stop in text), default=len(text))
    ]


# ---- the scheduler


def test_clients_are_served_in_turn() -> None:
    scheduler = Scheduler(slots=1, queue_limit=10, chunk_size=8)
    for client in ["greedy", "greedy", "greedy", "modest", "late"]:
        scheduler.add([Sequence([1], client=client)])
    served = []
    while not scheduler.idle:
        (chunk,) = scheduler.prefills()
        served.append(chunk.sequence.client)
        scheduler.remove(chunk.sequence)
    assert served == ["greedy", "modest", "late", "greedy", "greedy"]


def test_a_full_queue_refuses_and_takes_again_when_one_leaves() -> None:
    scheduler = Scheduler(slots=1, queue_limit=1, chunk_size=8)
    first, second, third = Sequence([1]), Sequence([1]), Sequence([1])
    assert scheduler.add([first]) == scheduler.add([second]) == []
    assert scheduler.add([third]) == [third]
    scheduler.remove(second)
    assert scheduler.add([third]) == []


def test_nobody_can_fill_the_queue_for_the_others() -> None:
    scheduler = Scheduler(slots=1, queue_limit=4, chunk_size=8)
    greedy = [Sequence([1], client="greedy") for _ in range(6)]
    assert [scheduler.add([sequence]) for sequence in greedy] == [[]] * 5 + [[greedy[5]]]
    scheduler.prefills()
    modest = [Sequence([1], client="modest") for _ in range(3)]
    assert [scheduler.add([sequence]) for sequence in modest] == [
        [greedy[4]],
        [greedy[3]],
        [modest[2]],
    ]
    assert scheduler.add([greedy[5]]) == [greedy[5]]
    assert scheduler.waiting == 4


def request_of(client: str, n: int = 1) -> list[Sequence]:
    return [Sequence([1], Sampling(choice=choice), client) for choice in range(n)]


def test_a_request_that_has_begun_goes_on_whoever_comes() -> None:
    scheduler = Scheduler(slots=2, queue_limit=4, chunk_size=8)
    begun, later, modest, other = (
        request_of("greedy", 4),
        request_of("greedy", 2),
        request_of("modest"),
        request_of("other"),
    )
    assert scheduler.add(begun) == []
    scheduler.prefills()  # two of its texts run, two wait
    assert scheduler.add(later) == []
    assert scheduler.add(modest) == later, "the newest of which nothing runs, as a whole"
    assert scheduler.add(request_of("late")) == []
    assert scheduler.add(other) == other, "greedy has the most, but what is left of it has begun"
    for sequence in begun[:2]:
        sequence.tokens.append(0)
        scheduler.remove(sequence)  # finished
    assert scheduler.add(request_of("third")) == scheduler.add(request_of("fourth")) == []
    assert scheduler.add(other) == other, (
        "its finished texts were sent: the others still belong to what has begun"
    )
    assert [chunk.sequence for chunk in scheduler.prefills()] == [begun[2], *modest]


def test_nobody_leaves_for_a_request_that_has_to_leave_all_the_same() -> None:
    scheduler = Scheduler(slots=0, queue_limit=64, chunk_size=8)
    for client, count in (("a", 22), ("b", 22), ("c", 20)):
        for _ in range(count):
            scheduler.add(request_of(client))
    assert scheduler.add(refused := request_of("c", 4)) == refused
    assert scheduler.waiting == 64
    leaving = scheduler.add(request_of("d", 4))
    assert [sequence.client for sequence in leaving] == ["a", "b", "a", "b"]
    assert scheduler.waiting == 64


def test_counts_can_be_read_while_the_queue_changes() -> None:
    scheduler = Scheduler(slots=1, queue_limit=200, chunk_size=8)
    requests = [request_of(str(client)) for client in range(100)]
    seen: list[int] = []

    def change() -> None:
        for _ in range(20):
            for request in requests:
                scheduler.add(request)
            for request in requests:
                scheduler.remove(request[0])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=change)
        thread.start()
        while thread.is_alive():
            seen.append(scheduler.waiting)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert scheduler.waiting == 0
    assert all(0 <= waiting <= 100 for waiting in seen)


def test_prompts_are_cut_at_the_same_places_whatever_else_runs() -> None:
    scheduler = Scheduler(slots=3, queue_limit=10, chunk_size=4)
    long, short = Sequence(list(range(10))), Sequence([1, 2])
    scheduler.add([short])
    scheduler.add([long])
    seen = []
    for _ in range(3):
        chunks = scheduler.prefills()
        assert sum(len(chunk.ids) for chunk in chunks) < 2 * 4
        for chunk in chunks:
            seen.append((chunk.sequence is long, chunk.start, chunk.ids))
            chunk.sequence.cached += len(chunk.ids)
    assert seen == [
        (False, 0, [1, 2]),
        (True, 0, [0, 1, 2, 3]),
        (True, 4, [4, 5, 6, 7]),
        (True, 8, [8, 9]),
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "step", "leave"]),
            st.integers(0, 30),
            st.sampled_from([1, 4]),
            st.sampled_from("abc"),
        ),
        max_size=60,
    )
)
def test_no_slot_leaks_and_no_sequence_is_lost(events: list[tuple[str, int, int, str]]) -> None:
    scheduler = Scheduler(slots=2, queue_limit=3, chunk_size=4)
    alive: list[Sequence] = []
    held: list[list[int]] = [[], []]
    for what, number, n, client in events:
        if what == "add":
            prompt = list(range(number % 13 + 1)) if number < 20 else [7] * (number % 13 + 1)
            request = [
                Sequence(prompt, Sampling(max_tokens=number % 8 + 1), client) for _ in range(n)
            ]
            refused = added(scheduler, request, alive)
            alive = [sequence for sequence in alive + request if sequence not in refused]
        elif what == "leave" and alive:
            for sequence in alive[number % len(alive)].request:
                scheduler.remove(sequence)
                if sequence in alive:
                    alive.remove(sequence)
        elif what == "step":
            step(scheduler, alive, held)
        slots = [sequence.slot for sequence in alive if sequence.slot is not None]
        assert len(set(slots)) == len(slots) == scheduler.running <= 2
        assert scheduler.running + scheduler.waiting == len(alive)
        assert scheduler.waiting <= 3 + 2 - scheduler.running
    while alive:
        before = sum(len(sequence.tokens) + sequence.cached for sequence in alive), len(alive)
        step(scheduler, alive, held)
        assert (
            sum(len(sequence.tokens) + sequence.cached for sequence in alive),
            len(alive),
        ) != before
    assert scheduler.idle
    scheduler.add([Sequence([99]), Sequence([99])])
    assert {chunk.sequence.slot for chunk in scheduler.prefills()} == {0, 1}


def added(scheduler: Scheduler, request: list[Sequence], alive: list[Sequence]) -> list[Sequence]:
    """What `Scheduler.add` returns, after a look at who had to leave."""
    waited = Counter(sequence.client for sequence in alive if sequence.slot is None)
    room = scheduler.queue_limit + scheduler.slots - scheduler.running - scheduler.waiting
    leaving = scheduler.add(request)
    if leaving == request:
        assert room < len(request)
        assert scheduler.waiting == waited.total(), "nobody has left in vain"
        return leaving
    assert (room >= len(request)) == (not leaving)
    for sequence in leaving:
        assert not any(one.slot is not None or one.tokens for one in sequence.request), (
            "what has begun goes on"
        )
        assert set(sequence.request) <= set(leaving), "as a whole"
        assert waited[sequence.client] > waited[request[0].client] + len(request), (
            "the newcomer's client had less"
        )
    return leaving


def step(scheduler: Scheduler, alive: list[Sequence], held: list[list[int]]) -> None:
    """What the engine does in a step, with a model that says 0. `held`: the prompts' tokens that lie in each slot."""
    for chunk in scheduler.prefills():
        slot = chunk.sequence.slot
        assert slot is not None
        if chunk.source is not None:
            assert chunk.start > chunk.sequence.cached, "nothing is copied without need"
            held[slot] = held[chunk.source][: chunk.start]
        assert chunk.start % 4 == 0
        held[slot] = [*held[slot][: chunk.start], *chunk.ids]
        chunk.sequence.cached = chunk.start + len(chunk.ids)
        assert held[slot] == chunk.sequence.prompt[: chunk.sequence.cached]
        if chunk.sequence.cached == len(chunk.sequence.prompt):
            chunk.sequence.tokens.append(0)
    for sequence in scheduler.decodes():
        sequence.cached += 1
        sequence.tokens.append(0)
        if len(sequence.tokens) >= sequence.sampling.max_tokens:
            scheduler.remove(sequence)
            alive.remove(sequence)


@pytest.mark.parametrize("copies", [True, False])
def test_chunks_that_prompts_begin_with_alike_are_computed_once(copies: bool) -> None:
    scheduler = Scheduler(slots=2, queue_limit=10, chunk_size=4, copies=copies)
    first, second = Sequence(list(range(9))), Sequence([*range(8), 99])
    scheduler.add([first])
    scheduler.add([second])
    computed: dict[int | None, list[tuple[int, int | None]]] = {0: [], 1: []}
    while first.cached < 9 or second.cached < 9:
        for chunk in scheduler.prefills():
            computed[chunk.sequence.slot].append((chunk.start, chunk.source))
            chunk.sequence.cached = chunk.start + len(chunk.ids)
    assert computed == {
        0: [(0, None), (4, None), (8, None)],
        1: [(8, 0)] if copies else [(0, None), (4, None), (8, None)],
    }
    scheduler.remove(first)
    scheduler.add(
        [again := Sequence(list(range(8)))]
    )  # in the first's slot, which holds its first chunk: the last is for the logits
    assert [(chunk.start, chunk.source) for chunk in scheduler.prefills()] == [(4, None)]
    scheduler.remove(again)
    scheduler.remove(second)
    scheduler.forget(0)
    scheduler.add([Sequence(list(range(8)))])
    assert (
        scheduler.prefills()[0] == Prefill(ANY, [4, 5, 6, 7], 4, 1)
        if copies
        else Prefill(ANY, [0, 1, 2, 3], 0)
    )


# ---- text


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.lists(st.integers(0, 255), max_size=30),
        st.text(max_size=12).map(lambda text: byte_tokenizer().encode(text).ids),
    )
)
def test_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    stream = TextStream(byte_tokenizer())
    assert "".join(map(stream.push, ids)) + stream.flush() == byte_tokenizer().decode(ids)


def test_no_half_character_is_shown() -> None:
    stream = TextStream(byte_tokenizer())
    pieces = [stream.push(token) for token in byte_tokenizer().encode("é€😀").ids]
    assert [piece for piece in pieces if piece] == ["é", "€", "😀"]


def test_a_token_that_is_no_whole_character_is_spelled_by_its_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert [spelled(tokenizer, token) for token in tokenizer.encode("A €").ids] == [
        "A",
        " ",
        r"bytes:\xe2",
        r"bytes:\x82",
        r"bytes:\xac",
    ]
    assert spelled(tokenizer, EOS) == "<|endoftext|>"
    # Every byte beyond ASCII, as UTF-8 may have it: "ÿ" and the like are two bytes each.
    encoded = "".join(map(chr, range(128, 0x800))).encode()
    spelling = [spelled(tokenizer, token) for token in tokenizer.encode(encoded.decode()).ids]
    assert bytes(int(one.removeprefix(r"bytes:\x"), 16) for one in spelling) == encoded


@settings(max_examples=200, deadline=None)
@given(st.text("ab-", max_size=20), st.lists(st.text("ab-", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_is_shown(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(byte_tokenizer(), tuple(stops)), ""
    consumed = 0
    for token in byte_tokenizer().encode(text).ids:
        shown += stream.push(token)
        consumed += 1
        # Whatever comes next, what was shown stays right.
        assert all(stop not in shown for stop in stops)
        if stream.ended_by:
            break
    shown += stream.flush()
    ends = [text[:consumed].find(stop) for stop in stops if stop in text[:consumed]]
    assert shown == text[: min(ends)] if ends else shown == text
    assert stream.ended_by == ("stop" if ends else None)


# ---- the engine


REQUESTS = [
    ("To be", Sampling(max_tokens=30, temperature=0)),
    ("", Sampling(max_tokens=25, temperature=0.7, seed=3)),
    ("O " * 20, Sampling(max_tokens=12, temperature=1.0, top_k=0, top_p=0.9, seed=4)),
    ("é€😀", Sampling(max_tokens=1, temperature=0.7, seed=5)),
    ("To be", Sampling(max_tokens=30, temperature=0.7, seed=6, stop=("a", "Q"))),
    ("x", Sampling(max_tokens=40, temperature=1.5, top_k=5, seed=7)),
    ("To be", Sampling(max_tokens=30, temperature=0)),
]


def test_the_same_text_alone_and_in_company() -> None:
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
    """One client's request, and when it comes and goes."""

    arrives: int  # once the engine has made so many tokens
    prompt: str
    sampling: Sampling
    n: int
    leaves: int | None  # once it has been told so many tokens; None: it stays to the end
    heard: dict[int, Chunk] = field(default_factory=dict)  # of each text

    async def listen(self, stream: Stream) -> None:
        async with contextlib.aclosing(stream.chunks()) as chunks:
            async for chunk in chunks:
                before = self.heard.get(chunk.choice)
                self.heard[chunk.choice] = chunk if before is None else before + chunk
                if (
                    self.leaves is not None
                    and sum(one.completion_tokens for one in self.heard.values()) >= self.leaves
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
        """What was heard is the reference's beginning, and all of it where the client has stayed: no token lost, none doubled."""
        tokenizer = byte_tokenizer()
        for choice in range(self.n):
            sampling = replace(self.sampling, choice=choice)
            text, spelling = (
                reference(self.prompt, sampling),
                [spelled(tokenizer, token) for token in reference_tokens(self.prompt, sampling)],
            )
            chunk = self.heard.get(choice)
            if self.leaves is None:
                assert chunk is not None
                assert (chunk.text, chunk.completion_tokens) == (text, len(spelling))
            if chunk is not None:
                assert text.startswith(chunk.text)
                assert [told.token for told in chunk.logprobs] == spelling[
                    : chunk.completion_tokens
                ]


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
    heard=st.builds(dict),
)


@settings(max_examples=40, deadline=None)
@given(plan=st.lists(visits, min_size=1, max_size=10), slots=st.integers(1, 4))
def test_whoever_comes_and_goes_the_others_get_their_tokens(plan: list[Visit], slots: int) -> None:
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


def test_a_stream_adds_up_to_the_whole_and_counts_its_tokens() -> None:
    async def scenario() -> None:
        async with engine_of(HashSession(step_s=0.001), interval_s=0.005) as engine:
            prompt, sampling = REQUESTS[0]
            chunks = [chunk async for chunk in engine.submit(prompt, sampling).chunks()]
            assert (
                "".join(chunk.text for chunk in chunks)
                == (await whole(engine.submit(prompt, sampling))).text
            )
            assert 1 < len(chunks) < 30, "tokens that are ready together go together"
            assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1] == Chunk(chunks[-1].text, 5, 30, "length")

    run(scenario)


def test_the_more_texts_are_streamed_the_rarer_are_the_chunks_of_each() -> None:
    async def scenario() -> None:
        async with engine_of(
            HashSession(slots=5, context=4000, step_s=0.002), interval_s=0.01, chunks_per_s=20
        ) as engine:
            nobody_waits_for_it = asyncio.create_task(
                engine.submit("To be", Sampling(max_tokens=3000, temperature=0)).results()
            )
            async with contextlib.AsyncExitStack() as stack:
                for begun, pause_s in enumerate((0.05, 0.1, 0.15, 0.2)):
                    stream = engine.submit("To be", Sampling(max_tokens=3000, temperature=0))
                    chunks = await stack.enter_async_context(contextlib.aclosing(stream.chunks()))
                    assert engine.streaming == begun
                    assert (await anext(chunks)).completion_tokens >= 1, (
                        "the first comes at once all the same"
                    )
                    assert (await anext(chunks)).completion_tokens >= 2
                    assert engine.pause_s() == pause_s
                engine.streaming += 400
                assert engine.pause_s() == 0.2, "a reader would see it stutter"
                engine.streaming -= 400
            assert engine.streaming == 0
            several = engine.submit("To be", Sampling(max_tokens=3000, temperature=0), n=9)
            async with contextlib.aclosing(several.chunks()) as chunks:
                async for chunk in chunks:
                    if chunk.completion_tokens > 100:
                        break
                assert 4 <= engine.streaming <= 5, "as many as have a slot"
            assert engine.streaming == 0
            assert engine.pause_s() == 0.01
            nobody_waits_for_it.cancel()

    run(scenario)


def test_a_client_that_goes_frees_its_slot_within_a_token() -> None:
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


def test_a_prompt_that_many_ask_with_is_computed_once_and_gives_the_same_texts() -> None:
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


def test_a_request_for_many_texts_is_one_request() -> None:
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


def test_a_requests_own_deadline_is_the_shorter_one() -> None:
    async def scenario() -> None:
        async with engine_of(HashSession(context=4000, step_s=0.002), timeout_s=1e6) as engine:
            with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 s"):
                await engine.submit(
                    "x", Sampling(max_tokens=3000, temperature=0), n=2, timeout_s=0.05
                ).results()
            assert engine.submit("x", Sampling(max_tokens=1), timeout_s=2e6).timeout_s == 1e6

    run(scenario)


def test_the_queue_is_bounded_and_a_deadline_holds_for_those_who_wait() -> None:
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


def test_a_client_with_few_requests_is_let_in_where_another_fills_the_queue() -> None:
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
            assert "the 1 slots are taken and 2 more requests wait" in str(refused)
            assert {answer.text for answer in answers if isinstance(answer, Chunk)} == {
                reference("To be", sampling)
            }
            assert all(isinstance(answer, Chunk) for answer in answers)

    run(scenario)


def test_a_stream_that_has_begun_is_not_cut_off_by_who_comes_later() -> None:
    async def scenario() -> None:
        async with engine_of(
            HashSession(slots=2, context=4000, step_s=0.002), queue_limit=2
        ) as engine:
            sampling = Sampling(max_tokens=60, temperature=1.0, seed=3)
            begun = asyncio.create_task(engine.submit("To be", sampling, "greedy", n=4).results())
            await until(lambda: engine.status()["running"] == engine.status()["waiting"] == 2)
            with pytest.raises(Overloaded):
                await engine.submit("x", sampling, "modest").results()
            expected = [reference("To be", replace(sampling, choice=choice)) for choice in range(4)]
            assert [text.text for text in await begun] == expected

    run(scenario)


def test_a_request_that_cannot_be_continued_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Spoiled(HashSession):
        """No numbers after an exclamation mark, and its slot spoils whoever takes it next, as masked NaNs do."""

        def __init__(self) -> None:
            super().__init__(slots=4)
            self.spoiled: set[int] = set()
            (self.mark,) = self.tokenizer.encode("!").ids

        def _seen(self, slot: int, logits: np.ndarray) -> np.ndarray:
            if self.mark in self.cache[slot]:
                self.spoiled.add(slot)
            return np.full_like(logits, np.nan) if slot in self.spoiled else logits

        def prefill(self, slot: int, ids: list[int], start: int = 0) -> np.ndarray:
            return self._seen(slot, super().prefill(slot, ids, start))

        def decode(self, slots: list[int], ids: list[int], lengths: list[int]) -> np.ndarray:
            return np.stack(
                [
                    self._seen(slot, row)
                    for slot, row in zip(slots, super().decode(slots, ids, lengths), strict=True)
                ]
            )

        def clear(self, slot: int) -> None:
            super().clear(slot)
            self.spoiled.remove(slot)

    async def scenario() -> None:
        session = Spoiled()
        stem, sampling = "O " * 10, Sampling(max_tokens=20, temperature=0.0, stop=("!",))
        async with engine_of(session, chunk_size=8) as engine:
            for how in (sampling, replace(sampling, temperature=0.7)):
                streams = [
                    engine.submit(stem + "!", how, n=2),
                    *(engine.submit(stem + end, how) for end in ("x", "y")),
                ]
                failed, *answers = await asyncio.gather(
                    *(stream.results() for stream in streams), return_exceptions=True
                )
                assert isinstance(failed, Failed)
                assert (failed.status, failed.code) == (500, "internal_error")
                assert [answer[0].text for answer in answers if isinstance(answer, list)] == [
                    reference(stem + end, how) for end in ("x", "y")
                ]
            again = await asyncio.gather(
                *(whole(engine.submit(stem + "x", sampling)) for _ in range(4))
            )
            assert {text.text for text in again} == {reference(stem + "x", sampling)}, (
                "no slot is left spoiled"
            )

    run(scenario)
    assert "the highest logit is nan" in caplog.text


def test_an_idle_engine_keeps_its_prompts_where_there_is_no_room_to_give_back() -> None:
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
                before = session.released
                await until(lambda: session.released > before)  # noqa: B023
            assert sum(session.prefill_sizes) == len(prompt) + 8

    run(scenario)


def test_an_idle_engine_gives_back_the_room_of_its_cache() -> None:
    async def scenario() -> None:
        session = HashSession(slots=1)
        async with engine_of(session, idle_s=0.01, chunk_size=8) as engine:
            await until(lambda: session.released >= 1)
            prompt, sampling = REQUESTS[2]
            for _ in range(2):  # the second must not use what was given back
                assert (await whole(engine.submit(prompt, sampling))).text == reference(
                    prompt, sampling
                )
                before = session.released
                await until(lambda: session.released > before and session.cache == [[]])  # noqa: B023

    run(scenario)


def test_lengths_are_checked_before_anything_is_computed() -> None:
    async def scenario() -> None:
        session = HashSession(context=96)
        async with engine_of(session) as engine:
            assert (
                await whole(engine.submit("x" * 80, Sampling(max_tokens=16)))
            ).prompt_tokens == 80
            before = list(session.prefill_sizes)
            with pytest.raises(
                TooLong, match="81 tokens and max_tokens 16 exceed the model's context of 96"
            ):
                engine.submit("x" * 81, Sampling(max_tokens=16))
            with pytest.raises(TooLong):
                engine.submit("x" * 50_000_000, Sampling(max_tokens=16))
            assert session.prefill_sizes == before

    run(scenario)


def test_closing_lets_those_under_way_finish() -> None:
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


def test_a_broken_session_fails_its_requests_and_says_so() -> None:
    class Broken(HashSession):
        def decode(self, slots: list[int], ids: list[int], lengths: list[int]) -> np.ndarray:
            raise RuntimeError("out of memory")

    async def scenario() -> None:
        engine = Engine(Broken(slots=1))
        streams = [engine.submit("x", Sampling(max_tokens=9)) for _ in range(2)]
        for stream in streams:
            with pytest.raises(Rejected, match="restarting"):
                await whole(stream)
        assert not engine.alive
        await asyncio.to_thread(engine.join, 20)

    run(scenario)
