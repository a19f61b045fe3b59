"""Who runs next: sequences wait in a fair queue, take a slot, and leave it. Plain Python: no model, no threads, no clock.

A step of the engine is the prompts' chunks of `prefills()`, then one token further for all of `decodes()`.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens drawn."""

    max_tokens: int = 16
    temperature: float = 0.7  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    choice: int = 0  # which of its request's texts: each is another of the same seed
    stop: tuple[str, ...] = ()
    logprobs: int | None = (
        None  # so many of the likeliest tokens are told with each token; None: nothing is told
    )


@dataclass(eq=False)
class Sequence:
    """One request's tokens on their way through a slot."""

    prompt: list[int]
    sampling: Sampling = Sampling()
    client: str = ""  # whose share of the queue it takes
    deadline: float = math.inf  # on the caller's clock
    tokens: list[int] = field(default_factory=list)  # generated so far
    slot: int | None = None
    cached: int = 0  # tokens whose keys and values lie in the slot
    request: list["Sequence"] = field(
        default_factory=list, repr=False
    )  # all of its request, itself included: `Scheduler.add` sets it


@dataclass(frozen=True)
class Prefill:
    """The next chunk of a prompt: `ids` go to the sequence's slot from position `start` on."""

    sequence: Sequence
    ids: list[int]
    start: int
    source: int | None = (
        None  # a slot that holds the prompt up to `start`, to be copied first; None: its own slot does
    )


class Scheduler:
    """Slots, and a bounded queue that serves its clients in turn.

    Args:
        slots: sequences that can run at once.
        queue_limit: sequences that may wait; where more come, the client with the most of them loses its newest request.
        chunk_size: most prompt tokens of one prefill. A prompt is cut at multiples of it, whatever else runs, so that
            its keys and values are computed the same way alone and in company. Whole chunks that prompts begin with alike
            are therefore the same to the bit, and computed once: later prompts take them over from the slot that has them.
        copies: whether a slot's content can be copied to another; else only what a slot itself still holds is taken over.
    """

    def __init__(self, slots: int, queue_limit: int, chunk_size: int, copies: bool = True) -> None:
        self.slots, self.queue_limit, self.chunk_size, self.copies = (
            slots,
            queue_limit,
            chunk_size,
            copies,
        )
        self._queues: OrderedDict[str, deque[Sequence]] = (
            OrderedDict()
        )  # per client; the next to be served first
        self._free = list(
            range(slots)
        )  # a heap: the lowest slots are taken first, so that a batch lies close together
        self._running: list[Sequence] = []
        self._tenants: list[Sequence | None] = [
            None
        ] * slots  # each slot's latest, whose keys and values it holds

    @property
    def waiting(self) -> int:
        # A list: other threads ask too, and the queues may change meanwhile.
        return sum(len(queue) for queue in list(self._queues.values()))

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._running and not self._queues

    def add(self, request: list[Sequence]) -> list[Sequence]:
        """Puts the new sequences of one request into the queue, and returns those that had to leave for them: maybe they themselves.

        A request comes and leaves as a whole. In a full queue the newest of the client with the most sequences there has to leave,
        so that nobody can shut the others out. What has begun goes on, and nobody leaves for a request that has to leave all the same.
        """
        for sequence in request:
            sequence.request = request
        leaving = self._leaving(request)
        if leaving != request:
            for sequence in leaving:
                self.remove(sequence)
            self._queues.setdefault(request[0].client, deque()).extend(request)
        return leaving

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its slot is free at once. Nothing happens where it has left already."""
        if sequence in self._running:
            assert sequence.slot is not None
            self._running.remove(sequence)
            heapq.heappush(self._free, sequence.slot)
            sequence.slot = None
            return
        queue = self._queues.get(sequence.client)
        if queue and sequence in queue:
            queue.remove(sequence)
            if not queue:
                del self._queues[sequence.client]

    def prefills(self) -> list[Prefill]:
        """Gives free slots to waiting sequences, and returns this step's chunks of prompts, in order of arrival in a slot.

        They sum to less than two chunks, so that the streams under way wait for a bounded time only.
        """
        while self._free and self._queues:
            self._admit()
        chunks: list[Prefill] = []
        budget = self.chunk_size
        for sequence in self._running:
            if budget <= 0:
                break
            source, start = self._longest_shared(sequence)
            while budget > 0 and start < len(sequence.prompt):
                ids = sequence.prompt[start : start + self.chunk_size]
                chunks.append(Prefill(sequence, ids, start, source))
                source = None
                start += len(ids)
                budget -= len(ids)
        return chunks

    def decodes(self) -> list[Sequence]:
        """The sequences whose newest token is not in their slot yet."""
        return [sequence for sequence in self._running if sequence.tokens]

    def expired(self, now: float) -> list[Sequence]:
        """The sequences, running or waiting, whose deadline has passed."""
        waiting = [sequence for queue in self._queues.values() for sequence in queue]
        return [sequence for sequence in self._running + waiting if sequence.deadline < now]

    def forget(self, slot: int) -> None:
        """A free slot's content is gone."""
        assert slot in self._free
        self._tenants[slot] = None

    def _leaving(self, request: list[Sequence]) -> list[Sequence]:
        """Who has to leave for a new request; the request itself where there aren't enough others to whom that may happen."""
        excess = self.waiting + len(request) - self.queue_limit - len(self._free)
        if excess <= 0:
            return []
        waiting = {client: len(queue) for client, queue in self._queues.items()}
        own = waiting.pop(request[0].client, 0) + len(request)
        untouched = {client: _untouched(self._queues[client]) for client in waiting}
        leaving: list[Sequence] = []
        while len(leaving) < excess:
            longest = max(
                (client for client in waiting if untouched[client]),
                key=lambda client: waiting[client],
                default=None,
            )
            if longest is None or waiting[longest] <= own:
                return request
            newest = untouched[longest].pop()
            waiting[longest] -= len(newest)
            leaving += newest
        return leaving

    def _longest_shared(self, sequence: Sequence) -> tuple[int | None, int]:
        """The slot that holds the most of what is still missing of a prompt, and how far; None where its own holds as much."""
        found: tuple[int | None, int] = None, sequence.cached
        for slot, tenant in enumerate(
            self._tenants if self.copies and sequence.cached < len(sequence.prompt) else []
        ):
            if tenant is not None and (held := self._shared(tenant, sequence)) > found[1]:
                found = slot, held
        return found

    def _shared(self, tenant: Sequence, sequence: Sequence) -> int:
        """The tokens of the whole chunks in a tenant's slot that a sequence's prompt begins with too.

        The prompt's last token is never among them: the logits after it have to be computed. Nor are generated tokens: a step
        of many rows may round otherwise than a prefill.
        """
        size = self.chunk_size
        end = min(tenant.cached, len(tenant.prompt), len(sequence.prompt) - 1) // size * size
        starts = range(0, end, size)
        return next(
            (
                start
                for start in starts
                if tenant.prompt[start : start + size] != sequence.prompt[start : start + size]
            ),
            end,
        )

    def _admit(self) -> None:
        client, queue = self._queues.popitem(last=False)
        sequence = queue.popleft()
        if queue:
            self._queues[client] = queue  # to the end of the round
        slot = heapq.heappop(self._free)
        before = self._tenants[slot]
        sequence.cached = 0 if before is None else self._shared(before, sequence)
        sequence.slot, self._tenants[slot] = slot, sequence
        self._running.append(sequence)


def _untouched(queue: deque[Sequence]) -> list[list[Sequence]]:
    """A client's waiting sequences by request, the newest last, without the request of which some run or have run."""
    requests = itertools.groupby(queue, key=lambda sequence: sequence.request)
    return [
        list(waiting)
        for request, waiting in requests
        if not any(one.slot is not None or one.tokens for one in request)
    ]
