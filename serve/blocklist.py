"""Words and phrases that must not be written: the text ends before the first of them, and a prompt that has one is refused."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import regex  # tells, as `re` does not, that a text may go on to be a match


class Found(NamedTuple):
    start: int
    end: int
    is_open: bool  # the text may go on so that it is none, or becomes one


class Blocklist:
    """Phrases, found as whole words, whatever their case and the white space between their words.

    Args:
        phrases: none blank.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        # The shortest first: of two that begin alike it is the one that is there as a whole.
        spelled = [
            r"\s+".join(regex.escape(word) for word in phrase.split())
            for phrase in sorted(phrases, key=len)
        ]
        assert all(spelled), phrases
        words, flags = rf"(?<!\w)(?:{'|'.join(spelled)})", regex.IGNORECASE | regex.FULLCASE
        self._whole = regex.compile(rf"{words}(?!\w)", flags)
        # In a text that goes on, a phrase at its end is none yet; `partial` would otherwise prefer it to a longer one that has begun before.
        self._followed = regex.compile(rf"{words}(?=\W)", flags)

    def find(self, text: str) -> str | None:
        """The first blocked phrase as the text has it; None: it has none."""
        found = self._whole.search(text)
        return found and found.group()

    def tail(self, prompt: str) -> tuple[str, int]:
        """What of a prompt's end is to be looked at with its text, and from where on a phrase may begin in it."""
        found = self._followed.search(prompt, partial=True)
        at = found.start() if found is not None and found.partial else len(prompt)
        return prompt[max(at - 1, 0) :], min(at, 1)

    def look(self, before: str, since: int, text: str, end: int | None) -> Found | None:
        """The first blocked phrase that a text has or may come to have.

        Args:
            before: what stands before the text, at least its last character: a phrase begins at a word's beginning.
            since: where in `before` a phrase may begin, to go on in the text; it counts as one at the text's beginning.
            end: where the text is over, though more of it may be known (a stop string); None: it goes on.
        """
        start = len(before)
        if end is None:
            found = self._followed.search(before + text, pos=since, partial=True)
            return found and Found(
                max(found.start() - start, 0), found.end() - start, found.partial
            )
        for found in self._whole.finditer(before + text[: end + 1], pos=since, overlapped=True):
            if found.end() - start <= end:
                return Found(max(found.start() - start, 0), found.end() - start, False)
        return None


def read(path: str | os.PathLike[str]) -> list[str]:
    """The phrases of a file, a line each; blank lines, and those that begin with #, are none.

    Raises:
        ValueError: the file cannot be read as UTF-8 text, or holds no phrase.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the blocklist {os.fspath(path)} cannot be read ({error}): give a text file in UTF-8, a phrase a line"
        ) from error
    phrases = [line for line in lines if line and not line.startswith("#")]
    if not phrases:
        raise ValueError(
            f"the blocklist {os.fspath(path)} holds no phrase: write one a line, or leave it out"
        )
    return phrases
