"""Blocked words and phrases: a prompt that contains one is refused, a text ends before one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import regex  # unlike `re`, it finds partial matches at the end of a text


class Match(NamedTuple):
    start: int
    end: int
    is_partial: bool  # the text that follows decides whether it becomes a match


class Blocklist:
    """Phrases that are found as whole words, regardless of case and white space between words.

    Args:
        phrases: none of them blank.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        # Shortest first: if one phrase starts with another, the shorter one is complete first.
        patterns = [
            r"\s+".join(regex.escape(word) for word in phrase.split())
            for phrase in sorted(phrases, key=len)
        ]
        assert all(patterns), phrases
        words, flags = rf"(?<!\w)(?:{'|'.join(patterns)})", regex.IGNORECASE | regex.FULLCASE
        self._whole = regex.compile(rf"{words}(?!\w)", flags)
        # While a text continues, a phrase at its end is not a match yet. Without the lookahead,
        # `partial` would prefer it to a longer phrase that starts earlier.
        self._followed = regex.compile(rf"{words}(?=\W)", flags)

    def find(self, text: str) -> str | None:
        """Return the first blocked phrase as it is spelled in the text, or None."""
        match = self._whole.search(text)
        return None if match is None else str(match.group())

    def prompt_context(self, prompt: str) -> tuple[str, int]:
        """Return the end of a prompt that may begin a phrase, and where in it a phrase may start.

        The two values are `before` and `since` of `find_next`.
        """
        match = self._followed.search(prompt, partial=True)
        at = match.start() if match is not None and match.partial else len(prompt)
        return prompt[max(at - 1, 0) :], min(at, 1)

    def find_next(self, before: str, since: int, text: str, end: int | None) -> Match | None:
        """Return the first phrase that the text contains, or that its end may begin, or None.

        Args:
            before: the characters before the text, at least one of them if there are any, because
                a phrase starts at the start of a word.
            since: where in `before` a phrase that continues in the text may start. Such a match
                counts as starting at the text's first character.
            end: where the text ends, although more of it may be known (a stop string); None: it
                continues.
        """
        start = len(before)
        if end is None:
            match = self._followed.search(before + text, pos=since, partial=True)
            if match is None:
                return None
            return Match(max(match.start() - start, 0), match.end() - start, match.partial)
        for match in self._whole.finditer(before + text[: end + 1], pos=since, overlapped=True):
            if match.end() - start <= end:
                return Match(max(match.start() - start, 0), match.end() - start, False)
        return None


def read(path: str | os.PathLike[str]) -> list[str]:
    """Return the phrases of a file, one per line, without blank lines and lines that start with #.

    Raises:
        ValueError: the file cannot be read as UTF-8 text, or contains no phrase.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the blocklist {os.fspath(path)} cannot be read ({error}): "
            "give a UTF-8 text file with one phrase per line"
        ) from error
    phrases = [line for line in lines if line and not line.startswith("#")]
    if not phrases:
        raise ValueError(
            f"the blocklist {os.fspath(path)} contains no phrase: "
            "write one phrase per line, or leave the option out"
        )
    return phrases
