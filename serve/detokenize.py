"""From a sequence's tokens to the text that may be shown: whole characters only, and no part of a stop string or a blocked phrase."""

import functools

import tokenizers
from tokenizers.decoders import DecodeStream

from serve.blocklist import Blocklist


class TextStream:
    """The text of one sequence, token by token.

    All that `push` and `flush` return, joined, is `tokenizer.decode(tokens)` up to the first stop string or blocked phrase.

    Args:
        stop: the text ends before the first of these.
        blocklist: and before the first of its phrases.
        prompt: what stands before the text: a blocked phrase may begin there.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        stop: tuple[str, ...] = (),
        blocklist: Blocklist | None = None,
        prompt: str = "",
    ) -> None:
        self.ended_by: str | None = None  # "stop" or "content_filter", once it has been ended
        self._tokenizer, self._stop, self._blocklist = tokenizer, stop, blocklist
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self.decoded = 0  # whole characters so far, held ones and a stop string's included
        self._before, self._since = (
            ("", 0) if blocklist is None else blocklist.tail(prompt)
        )  # see `Blocklist.look`
        self._held = ""  # decoded, but possibly the beginning of a stop string or a blocked phrase

    @property
    def shown(self) -> int:
        """Characters of the text that have been returned."""
        return self.decoded - len(self._held)

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that can be shown now, often empty. Sets `ended_by` where that ends the text."""
        assert self.ended_by is None
        self._tokens.append(token)
        piece = (
            self._stream.step(self._tokenizer, token) or ""
        )  # nothing while a character's bytes are incomplete
        self.decoded += len(piece)
        self._held += piece
        return self._release(ended=False)

    def flush(self) -> str:
        """The rest of the text, once the last token was pushed."""
        if self.ended_by is not None:
            return ""
        rest = self._tokenizer.decode(self._tokens)[self.decoded :]
        self.decoded += len(rest)
        self._held += rest
        return self._release(ended=True)

    def _release(self, ended: bool) -> str:
        """What can be shown of the held text; where it has not ended, without what may be the beginning of something that ends it."""
        stops = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        end = min(stops) if stops else len(self._held) if ended else None
        unstopped = (
            len(self._held) - self._unsafe_suffix() if end is None else end
        )  # no stop string has begun before
        found = (
            None
            if self._blocklist is None
            else self._blocklist.look(self._before, self._since, self._held, end)
        )
        if found is not None and not found.is_open and found.end <= unstopped:
            self.ended_by = "content_filter"
            split = found.start
        elif stops:
            self.ended_by = "stop"
            split = unstopped
        else:
            split = unstopped if found is None else min(found.start, unstopped)
        shown, self._held = self._held[:split], self._held[split:]
        if shown:
            self._before, self._since = shown[-1], 1
        return shown

    def _unsafe_suffix(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def spelled(tokenizer: tokenizers.Tokenizer, token: int) -> str:
    """One token as text; one that is no whole character as OpenAI spells it: its bytes, such as `bytes:\\xe2\\x82`."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text
    piece, alphabet = tokenizer.id_to_token(token), _byte_alphabet()
    assert piece is not None
    if not set(piece) <= set(alphabet):
        return piece  # a tokenizer that isn't byte-level has a spelling of its own, such as <0xE2>
    return "bytes:" + "".join(f"\\x{alphabet[character]:02x}" for character in piece)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, the other way round)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
