"""From a sequence's tokens to the text that may be shown.

Only whole characters are shown, and no part of a stop string or a blocked phrase.
"""

import functools

import tokenizers
from tokenizers.decoders import DecodeStream

from serve.text.blocklist import Blocklist


class TextStream:
    """The text of one sequence, token by token.

    Everything that `push` and `flush` return, joined, is `tokenizer.decode(tokens)` up to the first
    stop string or blocked phrase.

    Args:
        stop: strings; the text ends before the first of them.
        blocklist: phrases; the text ends before the first of them.
        prompt: the text before this one; a blocked phrase may start in it.

    Attributes:
        ended_by: "stop" or "content_filter" once one of them has ended the text.
        decoded: characters decoded so far, including those that are held back.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        stop: tuple[str, ...] = (),
        blocklist: Blocklist | None = None,
        prompt: str = "",
    ) -> None:
        self.ended_by: str | None = None
        self.decoded = 0
        self._tokenizer, self._stop, self._blocklist = tokenizer, stop, blocklist
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        # Arguments of `Blocklist.find_next`.
        self._before, self._since = (
            ("", 0) if blocklist is None else blocklist.prompt_context(prompt)
        )
        # Decoded, but possibly the start of a stop string or a blocked phrase.
        self._held = ""

    @property
    def shown(self) -> int:
        """The number of characters that have been returned."""
        return self.decoded - len(self._held)

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown now, which is often empty.

        Sets `ended_by` if a stop string or a blocked phrase ends the text.
        """
        assert self.ended_by is None
        self._tokens.append(token)
        # None while the bytes of a character are incomplete.
        piece = self._stream.step(self._tokenizer, token) or ""
        self.decoded += len(piece)
        self._held += piece
        return self._release(ended=False)

    def flush(self) -> str:
        """Return the rest of the text, after the last token was pushed."""
        if self.ended_by is not None:
            return ""
        rest = self._tokenizer.decode(self._tokens)[self.decoded :]
        self.decoded += len(rest)
        self._held += rest
        return self._release(ended=True)

    def _release(self, ended: bool) -> str:
        """Return the part of the held text that can be shown."""
        stops = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        end: int | None = None
        if stops:
            end = min(stops)
        elif ended:
            end = len(self._held)
        # No stop string has started before this position.
        unstopped = len(self._held) - self._unsafe_suffix() if end is None else end
        match = None
        if self._blocklist is not None:
            match = self._blocklist.find_next(self._before, self._since, self._held, end)
        if match is not None and not match.is_partial and match.end <= unstopped:
            self.ended_by = "content_filter"
            split = match.start
        elif stops:
            self.ended_by = "stop"
            split = unstopped
        else:
            split = unstopped if match is None else min(match.start, unstopped)
        shown, self._held = self._held[:split], self._held[split:]
        if shown:
            self._before, self._since = shown[-1], 1
        return shown

    def _unsafe_suffix(self) -> int:
        """Return the length of the longest suffix of the held text that starts a stop string."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def token_text(tokenizer: tokenizers.Tokenizer, token: int) -> str:
    r"""Return one token as text, or its bytes as OpenAI writes them (`bytes:\xe2\x82`).

    Bytes are returned for a token that is not a sequence of whole characters.
    """
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text
    piece, alphabet = tokenizer.id_to_token(token), _byte_alphabet()
    assert piece is not None
    if not set(piece) <= set(alphabet):
        return piece  # a tokenizer that is not byte-level has its own spelling, such as <0xE2>
    return "bytes:" + "".join(f"\\x{alphabet[character]:02x}" for character in piece)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary.

    The inverse of GPT-2's `bytes_to_unicode`.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
