"""Continuous batching: requests join and leave at every step of one thread; their text streams to asyncio consumers.

    engine = Engine(TextSession(folder))
    async for chunk in engine.submit("To be", Sampling(max_tokens=40)).chunks():
        print(chunk.text, end="")

The thread alone touches the scheduler and the session (but for counts, which others may read), so neither needs a lock: it
takes what the event loop wants (join, leave) from an inbox between two steps, and hands what a step made back to the loop in
one call.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import tokenizers

from serve.blocklist import Blocklist
from serve.detokenize import TextStream, spelled
from serve.errors import (
    Blocked,
    DeadlineExceeded,
    Failed,
    Overloaded,
    Rejected,
    TooLong,
    Unavailable,
)
from serve.sampling import logprobs, penalize, sample
from serve.scheduler import Sampling, Scheduler, Sequence

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 0.2  # between two chunks of a stream: a reader should not see it stutter
GONE = "the text model is restarting: try again in a moment"


class Session(Protocol):
    """What the engine needs of `serve.session.TextSession`."""

    slots: int
    context: int
    eos_token_id: int
    tokenizer: tokenizers.Tokenizer
    copies: bool

    def prefill(self, slot: int, ids: list[int], start: int = 0) -> np.ndarray: ...

    def decode(self, slots: list[int], ids: list[int], lengths: list[int]) -> np.ndarray: ...

    def copy(self, source: int, target: int, tokens: int) -> None: ...

    def clear(self, slot: int) -> None: ...

    def release(self) -> bool: ...


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token, and which it held likeliest."""

    token: str  # as `serve.detokenize.spelled`
    logprob: float
    top: dict[str, float]  # the likeliest tokens and this one, likeliest first
    offset: int  # of its first character in the text


@dataclass(frozen=True)
class Chunk:
    """What one of a request's texts has got since its last chunk."""

    text: str
    prompt_tokens: int
    completion_tokens: int  # in all, so far
    finish_reason: str | None = (
        None  # "stop" (end of text, or a stop string), "length" or "content_filter", in the last chunk
    )
    choice: int = 0  # which of the texts
    logprobs: tuple[
        TokenLogprob, ...
    ] = ()  # where they were asked for: one of each token since the last chunk

    def __add__(self, later: "Chunk") -> "Chunk":
        return replace(later, text=self.text + later.text, logprobs=self.logprobs + later.logprobs)


class Stream:
    """One request under way, as its consumer on the event loop sees it. `Engine.submit` makes it."""

    def __init__(
        self, engine: "Engine", prompt: str, sequences: list[Sequence], timeout_s: float
    ) -> None:
        self.prompt, self.sequences, self.timeout_s = prompt, sequences, timeout_s
        self._engine = engine
        self._pending: dict[int, Chunk] = {}  # of each text, what has not been taken yet
        self._unfinished = len(sequences)
        self._error: Rejected | None = None
        self._ready, self._done = asyncio.Event(), asyncio.Event()

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The texts as they come: the first chunk at once, then whatever was made in the meantime, at most every `Engine.pause_s`.

        Leaving early (a break with `aclosing`, a cancelled task) frees the request's slots.

        Raises:
            Overloaded: the queue was full, and this request was the one to leave (`Scheduler.add`).
            DeadlineExceeded: the request's time ran out.
            Unavailable: the engine has ended.
            Failed: the model's numbers, or the text made of them, could not be used.
        """
        return self._engine.observe(self._chunks(streamed=True), len(self.sequences))

    async def _chunks(self, streamed: bool) -> AsyncGenerator[Chunk, None]:
        unfinished, begun, counted = len(self.sequences), set[int](), 0
        try:
            while unfinished:
                await self._ready.wait()
                self._ready.clear()
                if self._error is not None:
                    raise self._error
                pending, self._pending = self._pending, {}
                for chunk in pending.values():
                    begun.add(chunk.choice)
                    if chunk.finish_reason is not None:
                        begun.remove(chunk.choice)
                        unfinished -= 1
                    yield chunk
                if streamed:
                    self._engine.streaming += len(begun) - counted
                    counted = len(begun)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._done.wait(), self._engine.pause_s())
        finally:
            self._engine.streaming -= counted
            self._engine.leave(self)

    async def results(self) -> list[Chunk]:
        """The whole texts, each in one chunk. Raises what `chunks` raises."""
        found: dict[int, Chunk] = {}
        async for chunk in self._engine.observe(self._chunks(streamed=False), len(self.sequences)):
            found[chunk.choice] = found[chunk.choice] + chunk if chunk.choice in found else chunk
        return [found[choice] for choice in range(len(self.sequences))]

    def deliver(self, news: "Chunk | Rejected") -> None:
        """Called on the event loop."""
        if isinstance(news, Rejected):
            self._error = news
        else:
            before = self._pending.get(news.choice)
            self._pending[news.choice] = news if before is None else before + news
            self._unfinished -= news.finish_reason is not None
        if self._error is not None or not self._unfinished:
            self._done.set()
        self._ready.set()


@dataclass
class _Text:
    """What the engine's thread keeps of a text under way."""

    stream: Stream
    shown: TextStream
    logprobs: list[tuple[int, TokenLogprob]] = field(
        default_factory=list
    )  # not told yet, each with its token's end in the text


class Engine:
    """Runs a session's slots for many requests at once. Made on the event loop that its consumers run on.

    Args:
        session: used by the engine's thread alone from now on.
        queue_limit: texts that may wait for a slot; where more come, the client with the most of them loses its newest request.
        chunk_size: most prompt tokens of one prefill.
        timeout_s: the longest that a request may take, its waiting included.
        interval_s: the shortest time between two chunks of a stream. A message to a client costs more than a token of a
            small model, and 50 a second look continuous.
        chunks_per_s: most chunks a second of all streams together, as far as `LONGEST_PAUSE_S` allows: what delivers them has its limit,
            and takes from the engine's CPU.
        blocklist: what no text may have; None: anything may be written.
        idle_s: once nothing was asked for so long, the room that the cache has grown by is given back, and with it the prompts that it
            holds.
        observe: every request's chunks go through it, with the number of its texts, on the event loop.
    """

    def __init__(
        self,
        session: Session,
        queue_limit: int = 64,
        chunk_size: int = 64,
        timeout_s: float = 300.0,
        interval_s: float = 0.02,
        chunks_per_s: float = math.inf,
        blocklist: Blocklist | None = None,
        idle_s: float = 10.0,
        observe: Callable[
            [AsyncGenerator[Chunk, None], int], AsyncGenerator[Chunk, None]
        ] = lambda chunks, n: chunks,
    ) -> None:
        self.session, self.timeout_s, self.idle_s, self.observe = (
            session,
            timeout_s,
            idle_s,
            observe,
        )
        self.interval_s, self.chunks_per_s, self.blocklist = interval_s, chunks_per_s, blocklist
        self.generated = 0  # tokens in all
        self.streaming = 0  # texts that have begun and are read as they come
        self._scheduler = Scheduler(session.slots, queue_limit, chunk_size, session.copies)
        self._longest_token = max(map(len, session.tokenizer.get_vocab(with_added_tokens=True)))
        self._texts: dict[Sequence, _Text] = {}  # those that the thread has taken in
        self._failed: dict[Stream, None] = {}  # in this step, in order
        self._inbox: queue.SimpleQueue[tuple[Callable[[Stream], None], Stream] | None] = (
            queue.SimpleQueue()
        )
        self._outbox: list[tuple[Stream, Chunk | Rejected]] = []
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self.alive = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- called on the event loop

    def submit(
        self,
        prompt: str,
        sampling: Sampling,
        client: str = "",
        n: int = 1,
        timeout_s: float | None = None,
    ) -> Stream:
        """Puts a request into the queue.

        Args:
            prompt: empty: the text starts as a document does.
            client: clients are served in turn.
            n: texts to write, of the choices 0 to n - 1.
            timeout_s: of this request, where it is shorter than the engine's.

        Raises:
            Blocked: the prompt has a phrase of the blocklist.
            TooLong: prompt and `max_tokens` do not fit into the model's context.
            Unavailable: the engine has ended.
        """
        ids = self._encode(prompt, sampling.max_tokens)
        if self.blocklist is not None and self.blocklist.find(
            prompt
        ):  # bounded now: what is too long has gone
            raise Blocked("the prompt has words that are blocked here: leave them out")
        if not self.alive:
            raise Unavailable(GONE)
        timeout_s = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        deadline = time.monotonic() + timeout_s
        stream = Stream(
            self,
            prompt,
            [
                Sequence(ids, replace(sampling, choice=choice), client, deadline)
                for choice in range(n)
            ],
            timeout_s,
        )
        self._inbox.put((self._join, stream))
        return stream

    def leave(self, stream: Stream) -> None:
        """The consumer has gone: from the next step on, the request's slots are others'."""
        self._inbox.put((self._drop, stream))

    def pause_s(self) -> float:
        """Between two chunks of a stream, with as many texts as are streamed now."""
        return max(self.interval_s, min(self.streaming / self.chunks_per_s, LONGEST_PAUSE_S))

    def close(self) -> None:
        """Ends the thread once everything submitted is finished."""
        self._inbox.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def status(self) -> dict[str, int]:
        """Counts: slots, requests running and waiting, tokens generated so far."""
        scheduler = self._scheduler
        return {
            "slots": scheduler.slots,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "generated": self.generated,
        }

    def _encode(self, prompt: str, max_tokens: int) -> list[int]:
        context = self.session.context
        # So many characters make no fewer tokens than this: what cannot fit is not even encoded.
        at_least = len(prompt) // self._longest_token
        ids = (
            []
            if at_least > context
            else self.session.tokenizer.encode(prompt).ids or [self.session.eos_token_id]
        )
        if not ids or len(ids) + max_tokens > context:
            tokens = f"{len(ids)}" if ids else f"at least {at_least}"
            raise TooLong(
                f"the prompt's {tokens} tokens and max_tokens {max_tokens} exceed the model's context of {context} tokens: "
                "shorten the prompt or ask for fewer tokens"
            )
        return ids

    # ---- the thread

    def _run(self) -> None:
        try:
            while self._take_in():
                self._step()
                self._hand_out()
        except Exception:
            logger.exception("the engine's thread ended")
        finally:
            self._hand_out()
            self._call(self._end)

    def _take_in(self) -> bool:
        """Lets requests join and leave, and waits for one where there is nothing to do. False: the engine is to end."""
        while not (self._closing and self._scheduler.idle):
            nothing_to_do = self._scheduler.idle and not self._outbox
            try:
                item = self._inbox.get(block=nothing_to_do, timeout=self.idle_s)
            except queue.Empty:
                if not nothing_to_do:
                    break
                if self.session.release():
                    for slot in range(self._scheduler.slots):
                        self._scheduler.forget(slot)
                continue
            if item is None:
                self._closing = True
            else:
                act, stream = item
                act(stream)
        for sequence in self._scheduler.expired(time.monotonic()):
            if sequence in self._texts:  # not gone with another of its request
                stream = self._texts[sequence].stream
                self._refuse(
                    stream,
                    DeadlineExceeded(
                        f"the request took longer than {stream.timeout_s:g} s: ask for fewer tokens, or later"
                    ),
                )
        return not (self._closing and self._scheduler.idle)

    def _join(self, stream: Stream) -> None:
        for sequence in stream.sequences:
            self._texts[sequence] = _Text(
                stream,
                TextStream(
                    self.session.tokenizer, sequence.sampling.stop, self.blocklist, stream.prompt
                ),
            )
        slots, waiting = self._scheduler.slots, self._scheduler.queue_limit
        leaving = {
            self._texts[sequence].stream: None for sequence in self._scheduler.add(stream.sequences)
        }
        for refused in leaving:
            self._refuse(
                refused,
                Overloaded(
                    f"the {slots} slots are taken and {waiting} more requests wait: try again in a moment"
                ),
            )

    def _refuse(self, stream: Stream, error: Rejected) -> None:
        self._drop(stream)
        self._outbox.append((stream, error))

    def _drop(self, stream: Stream) -> None:
        for sequence in stream.sequences:
            self._scheduler.remove(sequence)
            self._texts.pop(sequence, None)

    def _step(self) -> None:
        for prefill in self._scheduler.prefills():
            sequence = prefill.sequence
            assert sequence.slot is not None
            if prefill.source is not None:
                self.session.copy(prefill.source, sequence.slot, prefill.start)
            logits = self.session.prefill(sequence.slot, prefill.ids, prefill.start)
            sequence.cached = prefill.start + len(prefill.ids)
            if sequence.cached == len(sequence.prompt):
                self._accept(sequence, logits)
        batch = self._scheduler.decodes()
        if batch:
            slots = [sequence.slot for sequence in batch if sequence.slot is not None]
            rows = self.session.decode(
                slots,
                [sequence.tokens[-1] for sequence in batch],
                [sequence.cached for sequence in batch],
            )
            for sequence, logits in zip(batch, rows, strict=True):
                sequence.cached += 1
                self._accept(sequence, logits)
        self._refuse_failed()

    def _accept(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Goes on with a sequence. What cannot be made into text ends its own request, and nobody else's."""
        try:
            self._extend(sequence, logits)
        except Exception:
            logger.exception("a request could not be continued")
            self._failed[self._texts[sequence].stream] = None

    def _extend(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Draws a sequence's next token, and ends the sequence where that was its last."""
        how, text = sequence.sampling, self._texts[sequence]
        token = _drawn(sequence, logits)
        offset = text.shown.decoded
        sequence.tokens.append(token)
        self.generated += 1
        piece = "" if token == self.session.eos_token_id else text.shown.push(token)
        if how.logprobs is not None:
            text.logprobs.append(
                (text.shown.decoded, self._logprob(logits, token, how.logprobs, offset))
            )
        if token == self.session.eos_token_id or text.shown.ended_by is not None:
            reason = "stop"
        elif len(sequence.tokens) == how.max_tokens:
            reason = "length"
        else:
            if piece:
                self._tell(sequence, piece)
            return
        piece += text.shown.flush()
        reason = text.shown.ended_by or reason  # the held end may have completed what ends it
        self._tell(sequence, piece, reason)
        self._scheduler.remove(sequence)
        del self._texts[sequence]

    def _refuse_failed(self) -> None:
        """At a step's end: until then its prefills copy from slots, a failed request's among them."""
        for stream in self._failed:
            slots = [sequence.slot for sequence in stream.sequences if sequence.slot is not None]
            self._refuse(
                stream,
                Failed(
                    "this request could not be continued, and the server's log says why: try another prompt or seed"
                ),
            )
            for slot in slots:  # where the model's numbers have gone wrong, they lie there too
                self.session.clear(slot)
                self._scheduler.forget(slot)
        self._failed.clear()

    def _logprob(self, logits: np.ndarray, token: int, count: int, offset: int) -> TokenLogprob:
        tokenizer = self.session.tokenizer
        logprob, top = logprobs(logits, token, count)
        return TokenLogprob(
            spelled(tokenizer, token),
            logprob,
            {spelled(tokenizer, one): value for one, value in top.items()},
            offset,
        )

    def _tell(self, sequence: Sequence, piece: str, reason: str | None = None) -> None:
        text = self._texts[sequence]
        # Of what a blocklist holds back nothing is told; at the end the rest is, but for what was blocked.
        shown = (
            math.inf if self.blocklist is None or reason in ("stop", "length") else text.shown.shown
        )
        told = tuple(one for end, one in text.logprobs if end <= shown)
        text.logprobs = text.logprobs[len(told) :]
        chunk = Chunk(
            piece,
            len(sequence.prompt),
            len(sequence.tokens),
            reason,
            sequence.sampling.choice,
            told,
        )
        self._outbox.append((text.stream, chunk))

    def _hand_out(self) -> None:
        if self._outbox:
            self._call(self._deliver, self._outbox)
            self._outbox = []

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *args)

    # ---- called by the thread, on the event loop

    def _deliver(self, news: list[tuple[Stream, Chunk | Rejected]]) -> None:
        for stream, item in news:
            stream.deliver(item)

    def _end(self) -> None:
        """The thread's last word. `submit` runs on this loop too: what it put into the inbox before is all there."""
        self.alive = False
        left = {text.stream: None for text in self._texts.values()}
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None:
                left[item[1]] = None
        for stream in left:
            stream.deliver(Unavailable(GONE))


def _drawn(sequence: Sequence, logits: np.ndarray) -> int:
    how = sequence.sampling
    penalized = penalize(
        logits,
        sequence.prompt,
        sequence.tokens,
        repetition=how.repetition_penalty,
        presence=how.presence_penalty,
        frequency=how.frequency_penalty,
    )
    return sample(
        penalized,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=how.seed,
        choice=how.choice,
        position=len(sequence.tokens),
    )
