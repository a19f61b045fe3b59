"""Words and phrases that must not be written: the text ends before the first of them, and a prompt that has one is refused."""

import os
from collections.abc import Sequence
from pathlib import Path

import regex  # tells, as `re` does not, that a text may go on to be a match


class Blocklist:
    """Phrases, found as whole words, whatever their case and the white space between their words.

    Args:
        phrases: none blank.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        # The shortest first: of two that begin alike it is the one that is there as a whole.
        spelled = [r"\s+".join(regex.escape(word) for word in phrase.split()) for phrase in sorted(phrases, key=len)]
        assert all(spelled), phrases
        self._pattern = regex.compile(rf"(?<!\w)(?:{'|'.join(spelled)})(?!\w)", regex.IGNORECASE | regex.FULLCASE)

    def find(self, text: str) -> str | None:
        """The first blocked phrase as the text has it; None: it has none."""
        found = self._pattern.search(text)
        return found and found.group()

    def look(self, before: str, text: str, end: int | None) -> tuple[int | None, int]:
        """Where in a text the first blocked phrase begins (None: there is none), and up to where nothing can become one.

        Args:
            before: what stands before the text, at least its last character: a phrase begins at a word's beginning.
            end: where the text is over, though more of it may be known (a stop string); None: it goes on, so that its end may be
                the beginning of a phrase, or a phrase that of a longer word.
        """
        start = len(before)
        if end is not None:
            for found in self._pattern.finditer(before + text[: end + 1], pos=start, overlapped=True):
                if found.end() <= start + end:
                    return found.start() - start, end
            return None, end
        found = self._pattern.search(before + text, pos=start, partial=True)
        if found is None:
            return None, len(text)
        at = found.start() - start
        is_open = found.partial or found.end() == start + len(text)
        return (None, at) if is_open else (at, at)


def read(path: str | os.PathLike[str]) -> list[str]:
    """The phrases of a file, a line each; blank lines, and those that begin with #, are none.

    Raises:
        ValueError: the file cannot be read as UTF-8 text, or holds no phrase.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the blocklist {os.fspath(path)} cannot be read ({error}): give a text file in UTF-8, a phrase a line") from error
    phrases = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not phrases:
        raise ValueError(f"the blocklist {os.fspath(path)} holds no phrase: write one a line, or leave it out")
    return phrases
