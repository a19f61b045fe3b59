"""The scheduler: fairness, a bounded queue, chunks of prompts, the prefix cache."""

import sys
import threading
from collections import Counter
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text.sampling import Sampling
from serve.text.scheduler import Prefill, Scheduler, Sequence


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


def test_full_queue_refuses_until_one_is_removed() -> None:
    scheduler = Scheduler(slots=1, queue_limit=1, chunk_size=8)
    first, second, third = Sequence([1]), Sequence([1]), Sequence([1])
    assert scheduler.add([first]) == scheduler.add([second]) == []
    assert scheduler.add([third]) == [third]
    scheduler.remove(second)
    assert scheduler.add([third]) == []


def test_no_client_can_lock_out_the_others() -> None:
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


def test_started_request_is_not_evicted() -> None:
    scheduler = Scheduler(slots=2, queue_limit=4, chunk_size=8)
    started, later = request_of("greedy", 4), request_of("greedy", 2)
    modest, other = request_of("modest"), request_of("other")
    assert scheduler.add(started) == []
    scheduler.prefills()  # two of its texts run, two wait
    assert scheduler.add(later) == []
    assert scheduler.add(modest) == later, "the newest request that has not started, as a whole"
    assert scheduler.add(request_of("late")) == []
    assert scheduler.add(other) == other, "greedy has most, but its request has started"
    for sequence in started[:2]:
        sequence.tokens.append(0)
        scheduler.remove(sequence)  # finished
    assert scheduler.add(request_of("third")) == scheduler.add(request_of("fourth")) == []
    assert scheduler.add(other) == other, "the request still counts as started"
    assert [chunk.sequence for chunk in scheduler.prefills()] == [started[2], *modest]


def test_nothing_is_evicted_for_a_request_that_is_refused_anyway() -> None:
    scheduler = Scheduler(slots=0, queue_limit=64, chunk_size=8)
    for client, count in (("a", 22), ("b", 22), ("c", 20)):
        for _ in range(count):
            scheduler.add(request_of(client))
    assert scheduler.add(refused := request_of("c", 4)) == refused
    assert scheduler.waiting == 64
    evicted = scheduler.add(request_of("d", 4))
    assert [sequence.client for sequence in evicted] == ["a", "b", "a", "b"]
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


def test_prompts_are_cut_at_the_same_positions_regardless_of_others() -> None:
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
    for action, number, n, client in events:
        if action == "add":
            prompt = list(range(number % 13 + 1)) if number < 20 else [7] * (number % 13 + 1)
            request = [
                Sequence(prompt, Sampling(max_tokens=number % 8 + 1), client) for _ in range(n)
            ]
            refused = add(scheduler, request, alive)
            alive = [sequence for sequence in alive + request if sequence not in refused]
        elif action == "leave" and alive:
            for sequence in alive[number % len(alive)].request:
                scheduler.remove(sequence)
                if sequence in alive:
                    alive.remove(sequence)
        elif action == "step":
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


def add(scheduler: Scheduler, request: list[Sequence], alive: list[Sequence]) -> list[Sequence]:
    """Return what `Scheduler.add` returns, after checking which sequences it evicts."""
    waited = Counter(sequence.client for sequence in alive if sequence.slot is None)
    room = scheduler.queue_limit + scheduler.slots - scheduler.running - scheduler.waiting
    evicted = scheduler.add(request)
    if evicted == request:
        assert room < len(request)
        assert scheduler.waiting == waited.total(), "nothing is evicted in vain"
        return evicted
    assert (room >= len(request)) == (not evicted)
    for sequence in evicted:
        assert not any(one.slot is not None or one.tokens for one in sequence.request), (
            "started requests are not evicted"
        )
        assert set(sequence.request) <= set(evicted), "requests are evicted as a whole"
        assert waited[sequence.client] > waited[request[0].client] + len(request), (
            "the new request's client has fewer"
        )
    return evicted


def step(scheduler: Scheduler, alive: list[Sequence], held: list[list[int]]) -> None:
    """Do what the engine does in a step, with a model that always generates 0.

    Args:
        alive: sequences that are not finished.
        held: the tokens of prompts in each slot.
    """
    for chunk in scheduler.prefills():
        slot = chunk.sequence.slot
        assert slot is not None
        if chunk.source is not None:
            assert chunk.start > chunk.sequence.cached, "nothing is copied needlessly"
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
def test_common_prefix_is_computed_once(copies: bool) -> None:
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
    # It gets the slot of `first`, which holds both of its chunks. The last one is computed all the
    # same, for its logits.
    scheduler.add([again := Sequence(list(range(8)))])
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
