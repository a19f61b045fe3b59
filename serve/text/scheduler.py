"""Which sequences run next: they wait in a fair queue, take a slot, and give it back.

Plain Python without a model, threads or a clock. A step of the engine runs the prompt chunks of
`prefills()`, then decodes one token for each sequence of `decodes()`.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from serve.text.sampling import Sampling


@dataclass(eq=False)
class Sequence:
    """The tokens of one text: a prompt, and what has been generated after it."""

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    client: str = ""  # the client whose part of the queue it occupies
    deadline: float = math.inf  # on the caller's clock
    tokens: list[int] = field(default_factory=list)  # generated so far
    slot: int | None = None
    cached: int = 0  # tokens whose keys and values are in the slot's KV cache
    # All sequences of its request, itself included; `Scheduler.add` sets it.
    request: list["Sequence"] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Prefill:
    """The next chunk of a prompt: `ids` go into the sequence's slot at position `start`."""

    sequence: Sequence
    ids: list[int]
    start: int
    # A slot that holds the prompt up to `start` and is copied first; None: its own slot holds it.
    source: int | None = None


class Scheduler:
    """Slots, and a bounded queue that serves its clients in turn.

    Args:
        slots: sequences that can run at once.
        queue_limit: sequences that can wait. If more arrive, the client with the most waiting
            sequences loses its newest request.
        chunk_size: the maximum number of prompt tokens per prefill. Prompts are always cut at
            multiples of it, so that keys and values are computed the same way alone and in a
            batch. Whole chunks that two prompts have in common are therefore bit-identical, and
            are computed once: later prompts copy them from the slot that holds them.
        copies: whether a slot's cache can be copied to another slot. If not, a prompt reuses only
            what its own slot still holds.
    """

    def __init__(self, slots: int, queue_limit: int, chunk_size: int, copies: bool = True) -> None:
        self.slots, self.queue_limit = slots, queue_limit
        self.chunk_size, self.copies = chunk_size, copies
        # By client; the client that is served next comes first.
        self._queues: OrderedDict[str, deque[Sequence]] = OrderedDict()
        # A heap: the lowest slots are used first, so that a batch covers few rows.
        self._free = list(range(slots))
        self._running: list[Sequence] = []
        # The latest sequence of each slot, whose keys and values the slot holds.
        self._occupants: list[Sequence | None] = [None] * slots

    @property
    def waiting(self) -> int:
        # A copy: other threads read this count while the queues change.
        return sum(len(queue) for queue in list(self._queues.values()))

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._running and not self._queues

    def add(self, request: list[Sequence]) -> list[Sequence]:
        """Queue the new sequences of one request.

        A request is accepted or refused as a whole. If the queue is full, the client with the most
        waiting sequences loses its newest request, so that no client can lock out the others.
        Requests that have started are not removed, and none is removed for a request that would
        be refused anyway.

        Returns:
            The sequences that were removed to make room, or `request` itself if it is refused.
        """
        for sequence in request:
            sequence.request = request
        evicted = self._evicted_for(request)
        if evicted != request:
            for sequence in evicted:
                self.remove(sequence)
            self._queues.setdefault(request[0].client, deque()).extend(request)
        return evicted

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from its slot or the queue, if it is in one of them."""
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
        """Assign free slots to waiting sequences, and return the prompt chunks of this step.

        Chunks are in the order in which their sequences got a slot. They sum to less than two
        times `chunk_size` tokens, which bounds the time that running streams wait.
        """
        while self._free and self._queues:
            self._admit()
        chunks: list[Prefill] = []
        budget = self.chunk_size
        for sequence in self._running:
            if budget <= 0:
                break
            source, start = self._longest_prefix(sequence)
            while budget > 0 and start < len(sequence.prompt):
                ids = sequence.prompt[start : start + self.chunk_size]
                chunks.append(Prefill(sequence, ids, start, source))
                source = None
                start += len(ids)
                budget -= len(ids)
        return chunks

    def decodes(self) -> list[Sequence]:
        """Return the sequences whose newest token is not in their slot yet."""
        return [sequence for sequence in self._running if sequence.tokens]

    def expired(self, now: float) -> list[Sequence]:
        """Return the running and waiting sequences whose deadline has passed."""
        waiting = [sequence for queue in self._queues.values() for sequence in queue]
        return [sequence for sequence in self._running + waiting if sequence.deadline < now]

    def forget(self, slot: int) -> None:
        """Record that the cache of a free slot has been cleared."""
        assert slot in self._free
        self._occupants[slot] = None

    def _evicted_for(self, request: list[Sequence]) -> list[Sequence]:
        """Return the sequences to remove for a new request, or the request if it must be refused.

        It is refused if not enough other sequences may be removed.
        """
        excess = self.waiting + len(request) - self.queue_limit - len(self._free)
        if excess <= 0:
            return []
        waiting = {client: len(queue) for client, queue in self._queues.items()}
        own = waiting.pop(request[0].client, 0) + len(request)
        unstarted = {client: _unstarted(self._queues[client]) for client in waiting}
        evicted: list[Sequence] = []
        while len(evicted) < excess:
            longest = max(
                (client for client in waiting if unstarted[client]),
                key=lambda client: waiting[client],
                default=None,
            )
            if longest is None or waiting[longest] <= own:
                return request
            newest = unstarted[longest].pop()
            waiting[longest] -= len(newest)
            evicted += newest
        return evicted

    def _longest_prefix(self, sequence: Sequence) -> tuple[int | None, int]:
        """Return the slot that holds the longest prefix of a prompt, and the prefix's length.

        The slot is None if the sequence's own slot holds as much.
        """
        found: tuple[int | None, int] = None, sequence.cached
        if not self.copies or sequence.cached >= len(sequence.prompt):
            return found
        for slot, occupant in enumerate(self._occupants):
            if occupant is None:
                continue
            length = self._common_prefix(occupant, sequence)
            if length > found[1]:
                found = slot, length
        return found

    def _common_prefix(self, occupant: Sequence, sequence: Sequence) -> int:
        """Return the length of the prefix of whole chunks that a slot and a prompt share.

        It excludes the prompt's last token, whose logits have to be computed, and generated tokens:
        a decode step of many rows may round differently from a prefill.
        """
        size = self.chunk_size
        end = min(occupant.cached, len(occupant.prompt), len(sequence.prompt) - 1) // size * size
        for start in range(0, end, size):
            if occupant.prompt[start : start + size] != sequence.prompt[start : start + size]:
                return start
        return end

    def _admit(self) -> None:
        client, queue = self._queues.popitem(last=False)
        sequence = queue.popleft()
        if queue:
            self._queues[client] = queue  # at the end of the round
        slot = heapq.heappop(self._free)
        previous = self._occupants[slot]
        sequence.cached = 0 if previous is None else self._common_prefix(previous, sequence)
        sequence.slot, self._occupants[slot] = slot, sequence
        self._running.append(sequence)


def _unstarted(queue: deque[Sequence]) -> list[list[Sequence]]:
    """Return a client's waiting sequences by request, newest last, without started requests."""
    requests = itertools.groupby(queue, key=lambda sequence: sequence.request)
    return [
        list(waiting)
        for request, waiting in requests
        if not any(one.slot is not None or one.tokens for one in request)
    ]
