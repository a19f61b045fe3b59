"""One request for text while it runs, as its consumer on the event loop sees it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from serve.errors import RequestError
from serve.text.chunks import Chunk
from serve.text.scheduler import Sequence

LONGEST_PAUSE_S = 0.2  # between two chunks of a stream; longer pauses look like stutter

Observer = Callable[[AsyncGenerator[Chunk, None], int], AsyncGenerator[Chunk, None]]


class Pace:
    """How often streams get a chunk: the pause grows with the number of texts being streamed.

    Args:
        interval_s: the shortest pause between two chunks of a stream.
        chunks_per_s: the maximum number of chunks of all streams together, as far as
            `LONGEST_PAUSE_S` allows.

    Attributes:
        streaming: texts that have started and are read while they are generated.
    """

    def __init__(self, interval_s: float, chunks_per_s: float) -> None:
        self.interval_s, self.chunks_per_s, self.streaming = interval_s, chunks_per_s, 0

    def pause_s(self) -> float:
        """Return the pause between two chunks of a stream."""
        return max(self.interval_s, min(self.streaming / self.chunks_per_s, LONGEST_PAUSE_S))


class Generation:
    """One request for text. `serve.text.engine.Engine.submit` creates it.

    Args:
        prompt, sequences, timeout_s: of the request.
        pace: shared by all requests of the engine.
        observe: wraps the chunks of a request; called with them and the number of texts.
        leave: called with the generation when the consumer stops reading.
    """

    def __init__(
        self,
        prompt: str,
        sequences: list[Sequence],
        timeout_s: float,
        pace: Pace,
        observe: Observer,
        leave: Callable[["Generation"], None],
    ) -> None:
        self.prompt, self.sequences, self.timeout_s = prompt, sequences, timeout_s
        self._pace, self._observe, self._leave = pace, observe, leave
        self._pending: dict[int, Chunk] = {}  # by choice; not consumed yet
        self._unfinished = len(sequences)
        self._error: RequestError | None = None
        self._ready, self._done = asyncio.Event(), asyncio.Event()

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the texts while they are generated.

        The first chunk comes at once; each later one has everything that was generated in the
        meantime, after a pause of `Pace.pause_s`. Stopping early (a break with `aclosing`, a
        cancelled task) frees the request's slots.

        Raises:
            Overloaded: the queue was full, and this request was refused (`Scheduler.add`).
            DeadlineExceeded: the request took too long.
            Unavailable: the engine has ended.
            GenerationFailed: the model's output is unusable, such as NaN.
        """
        return self._observe(self._chunks(streamed=True), len(self.sequences))

    async def _chunks(self, streamed: bool) -> AsyncGenerator[Chunk, None]:
        unfinished, started, counted = len(self.sequences), set[int](), 0
        try:
            while unfinished:
                await self._ready.wait()
                self._ready.clear()
                if self._error is not None:
                    raise self._error
                pending, self._pending = self._pending, {}
                for chunk in pending.values():
                    started.add(chunk.choice)
                    if chunk.finish_reason is not None:
                        started.remove(chunk.choice)
                        unfinished -= 1
                    yield chunk
                if streamed:
                    self._pace.streaming += len(started) - counted
                    counted = len(started)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._done.wait(), self._pace.pause_s())
        finally:
            self._pace.streaming -= counted
            self._leave(self)

    async def results(self) -> list[Chunk]:
        """Return the whole texts, one chunk per choice. Raises the same errors as `chunks`."""
        found: dict[int, Chunk] = {}
        async for chunk in self._observe(self._chunks(streamed=False), len(self.sequences)):
            found[chunk.choice] = found[chunk.choice] + chunk if chunk.choice in found else chunk
        return [found[choice] for choice in range(len(self.sequences))]

    def deliver(self, item: Chunk | RequestError) -> None:
        """Hand a chunk or an error to the consumer. Called on the event loop."""
        if isinstance(item, RequestError):
            self._error = item
        else:
            before = self._pending.get(item.choice)
            self._pending[item.choice] = item if before is None else before + item
            self._unfinished -= item.finish_reason is not None
        if self._error is not None or not self._unfinished:
            self._done.set()
        self._ready.set()
