"""Continuous batching: requests join and leave at every step of one thread.

    engine = Engine(TextSession(folder))
    async for chunk in engine.submit("To be", Sampling(max_tokens=40)).chunks():
        print(chunk.text, end="")

Only that thread uses the scheduler and the session (other threads may read counts), so neither
needs a lock. The event loop puts requests that join or leave into an inbox, which the thread
empties between two steps. The thread returns the output of a step to the event loop in one call.
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

from serve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    GenerationFailed,
    Overloaded,
    PromptBlocked,
    RequestError,
    Unavailable,
)
from serve.text.blocklist import Blocklist
from serve.text.chunks import Chunk, TokenLogprob
from serve.text.detokenize import TextStream, token_text
from serve.text.generation import Generation, Observer, Pace
from serve.text.sampling import Sampling, logprobs, penalize, sample
from serve.text.scheduler import Scheduler, Sequence

logger = logging.getLogger(__name__)

RESTARTING = "the text model is restarting: try again in a moment"


class Session(Protocol):
    """The part of `serve.session.TextSession` that the engine uses."""

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


@dataclass
class _Text:
    """The state of a text that the engine's thread keeps beside its `Sequence`."""

    generation: Generation
    stream: TextStream
    # Not sent yet, each with the end of its token in the text.
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)


def _unobserved(chunks: AsyncGenerator[Chunk, None], texts: int) -> AsyncGenerator[Chunk, None]:
    return chunks


class Engine:
    """Runs a session's slots for many requests at once.

    Create it on the event loop on which its consumers run.

    Args:
        session: from now on used by the engine's thread only.
        queue_limit: texts that can wait for a slot. If more arrive, the client with the most
            waiting texts loses its newest request.
        chunk_size: the maximum number of prompt tokens per prefill.
        timeout_s: the longest time that a request may take, waiting included.
        interval_s: the shortest time between two chunks of a stream. A message to a client costs
            more than a token of a small model, and 50 per second look continuous.
        chunks_per_s: the maximum number of chunks of all streams together (`Pace`). Delivering
            them takes CPU time from the engine.
        blocklist: phrases that no prompt and no text may contain; None: no restriction.
        idle_s: after this time without requests, memory by which the KV cache has grown is
            released. The prompts in the cache are lost with it.
        observe: wraps the chunks of every request, on the event loop; called with the chunks and
            the number of texts.
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
        observe: Observer = _unobserved,
    ) -> None:
        self.session, self.timeout_s, self.idle_s = session, timeout_s, idle_s
        self.observe, self.blocklist = observe, blocklist
        self.pace = Pace(interval_s, chunks_per_s)
        self.generated = 0  # tokens in total
        self._scheduler = Scheduler(session.slots, queue_limit, chunk_size, session.copies)
        self._longest_token = max(map(len, session.tokenizer.get_vocab(with_added_tokens=True)))
        self._texts: dict[Sequence, _Text] = {}  # those that the thread has accepted
        self._failed: dict[Generation, None] = {}  # in this step; a dict keeps the order
        self._inbox: queue.SimpleQueue[tuple[Callable[[Generation], None], Generation] | None] = (
            queue.SimpleQueue()
        )
        self._outbox: list[tuple[Generation, Chunk | RequestError]] = []
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
    ) -> Generation:
        """Queue a request.

        Args:
            prompt: if empty, the text starts like a document.
            client: clients are served in turn.
            n: texts to generate, with the choices 0 to n - 1.
            timeout_s: of this request, if shorter than the engine's.

        Raises:
            PromptBlocked: the prompt contains a phrase of the blocklist.
            ContextLengthExceeded: prompt and `max_tokens` do not fit into the model's context.
            Unavailable: the engine has ended.
        """
        ids = self._encode(prompt, sampling.max_tokens)
        # After `_encode`, which bounds the prompt's length.
        if self.blocklist is not None and self.blocklist.find(prompt):
            raise PromptBlocked("the prompt contains words that are blocked here: leave them out")
        if not self.alive:
            raise Unavailable(RESTARTING)
        timeout_s = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        deadline = time.monotonic() + timeout_s
        sequences = [
            Sequence(ids, replace(sampling, choice=choice), client, deadline) for choice in range(n)
        ]
        generation = Generation(
            prompt, sequences, timeout_s, self.pace, self.observe, self._request_drop
        )
        self._inbox.put((self._join, generation))
        return generation

    def close(self) -> None:
        """End the thread once everything that was submitted is finished."""
        self._inbox.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def status(self) -> dict[str, int]:
        """Return the number of slots, running and waiting texts, and tokens generated so far."""
        scheduler = self._scheduler
        return {
            "slots": scheduler.slots,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "generated": self.generated,
        }

    def _request_drop(self, generation: Generation) -> None:
        """Free a request's slots before the next step: its consumer has stopped reading."""
        self._inbox.put((self._drop, generation))

    def _encode(self, prompt: str, max_tokens: int) -> list[int]:
        context = self.session.context
        # A lower bound of the prompt's tokens, to refuse a huge prompt without encoding it.
        at_least = len(prompt) // self._longest_token
        ids: list[int] = []
        if at_least <= context:
            ids = self.session.tokenizer.encode(prompt).ids or [self.session.eos_token_id]
        if not ids or len(ids) + max_tokens > context:
            tokens = f"{len(ids)}" if ids else f"at least {at_least}"
            raise ContextLengthExceeded(
                f"the prompt's {tokens} tokens and max_tokens {max_tokens} exceed the model's "
                f"context of {context} tokens: shorten the prompt or ask for fewer tokens"
            )
        return ids

    # ---- the thread

    def _run(self) -> None:
        try:
            while self._process_inbox():
                self._step()
                self._flush_outbox()
        except Exception:
            logger.exception("the engine's thread ended")
        finally:
            self._flush_outbox()
            self._call(self._end)

    def _process_inbox(self) -> bool:
        """Let requests join and leave, and wait for one if there is nothing to do.

        Returns:
            False if the engine has to end.
        """
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
                act, generation = item
                act(generation)
        for sequence in self._scheduler.expired(time.monotonic()):
            # It is missing if another sequence of its request has expired in this loop.
            if sequence in self._texts:
                generation = self._texts[sequence].generation
                self._refuse(
                    generation,
                    DeadlineExceeded(
                        f"the request took longer than {generation.timeout_s:g} s: "
                        "ask for fewer tokens, or try again later"
                    ),
                )
        return not (self._closing and self._scheduler.idle)

    def _join(self, generation: Generation) -> None:
        for sequence in generation.sequences:
            stream = TextStream(
                self.session.tokenizer, sequence.sampling.stop, self.blocklist, generation.prompt
            )
            self._texts[sequence] = _Text(generation, stream)
        slots, waiting = self._scheduler.slots, self._scheduler.queue_limit
        evicted = {
            self._texts[sequence].generation: None
            for sequence in self._scheduler.add(generation.sequences)
        }
        for refused in evicted:
            self._refuse(
                refused,
                Overloaded(
                    f"the {slots} slots are in use and {waiting} more texts wait: "
                    "try again in a moment"
                ),
            )

    def _refuse(self, generation: Generation, error: RequestError) -> None:
        self._drop(generation)
        self._outbox.append((generation, error))

    def _drop(self, generation: Generation) -> None:
        for sequence in generation.sequences:
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
                self._extend_or_fail(sequence, logits)
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
                self._extend_or_fail(sequence, logits)
        self._refuse_failed()

    def _extend_or_fail(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Extend a sequence; an error ends its own request and no other."""
        try:
            self._extend(sequence, logits)
        except Exception:
            logger.exception("a request could not be continued")
            self._failed[self._texts[sequence].generation] = None

    def _extend(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Draw a sequence's next token, and end the sequence if that was its last."""
        sampling, text = sequence.sampling, self._texts[sequence]
        token = _draw(sequence, logits)
        offset = text.stream.decoded
        sequence.tokens.append(token)
        self.generated += 1
        piece = "" if token == self.session.eos_token_id else text.stream.push(token)
        if sampling.logprobs is not None:
            logprob = self._logprob(logits, token, sampling.logprobs, offset)
            text.logprobs.append((text.stream.decoded, logprob))
        if token == self.session.eos_token_id or text.stream.ended_by is not None:
            reason = "stop"
        elif len(sequence.tokens) == sampling.max_tokens:
            reason = "length"
        else:
            if piece:
                self._send(sequence, piece)
            return
        piece += text.stream.flush()
        # The text that was held back may have completed a stop string or a blocked phrase.
        reason = text.stream.ended_by or reason
        self._send(sequence, piece, reason)
        self._scheduler.remove(sequence)
        del self._texts[sequence]

    def _refuse_failed(self) -> None:
        """Refuse the requests that failed in this step.

        Called at the end of a step: its prefills may copy from the slots of failed requests.
        """
        for generation in self._failed:
            slots = [one.slot for one in generation.sequences if one.slot is not None]
            self._refuse(
                generation,
                GenerationFailed(
                    "this request could not be continued, and the server's log says why: "
                    "try another prompt or seed"
                ),
            )
            for slot in slots:  # the cache may contain NaN as well
                self.session.clear(slot)
                self._scheduler.forget(slot)
        self._failed.clear()

    def _logprob(self, logits: np.ndarray, token: int, count: int, offset: int) -> TokenLogprob:
        tokenizer = self.session.tokenizer
        logprob, top = logprobs(logits, token, count)
        return TokenLogprob(
            token_text(tokenizer, token),
            logprob,
            {token_text(tokenizer, one): value for one, value in top.items()},
            offset,
        )

    def _send(self, sequence: Sequence, piece: str, reason: str | None = None) -> None:
        text = self._texts[sequence]
        # With a blocklist, log probabilities are held back together with their text. At the end
        # all are sent, except those of blocked text.
        all_shown = self.blocklist is None or reason in ("stop", "length")
        shown = math.inf if all_shown else text.stream.shown
        sent = tuple(logprob for end, logprob in text.logprobs if end <= shown)
        text.logprobs = text.logprobs[len(sent) :]
        chunk = Chunk(
            piece,
            len(sequence.prompt),
            len(sequence.tokens),
            reason,
            sequence.sampling.choice,
            sent,
        )
        self._outbox.append((text.generation, chunk))

    def _flush_outbox(self) -> None:
        if self._outbox:
            self._call(self._deliver, self._outbox)
            self._outbox = []

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there are no consumers
            self._loop.call_soon_threadsafe(function, *args)

    # ---- called by the thread, on the event loop

    def _deliver(self, items: list[tuple[Generation, Chunk | RequestError]]) -> None:
        for generation, item in items:
            generation.deliver(item)

    def _end(self) -> None:
        """Refuse what is left when the thread has ended.

        `submit` runs on the same event loop, so everything it has queued is in the inbox by now.
        """
        self.alive = False
        left = {text.generation: None for text in self._texts.values()}
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None:
                left[item[1]] = None
        for generation in left:
            generation.deliver(Unavailable(RESTARTING))


def _draw(sequence: Sequence, logits: np.ndarray) -> int:
    sampling = sequence.sampling
    penalized = penalize(
        logits,
        sequence.prompt,
        sequence.tokens,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
    )
    return sample(
        penalized,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        choice=sampling.choice,
        position=len(sequence.tokens),
    )
