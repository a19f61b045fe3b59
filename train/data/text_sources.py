"""Find text, check it, and read it as cleaned documents.

A source is "shakespeare", hf:NAME, or any number of files, folders, globs and URIs.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from train.config.data import TextData
from train.data.hub import download_parquet
from train.data.shipped.files import shipped
from train.data.sources import HELDOUT_NAMES, find_files, open_parquet

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Part:
    """What one task packs: a file, or one row group of a parquet file."""

    uri: str
    row_group: int | None
    heldout: bool | None
    """None: its documents decide (a column "split"), or data.heldout_fraction does."""


# ---- finding and checking


def find_parts(data: TextData) -> list[Part]:
    """Return the parts of the source and of data.heldout.

    Parquet files are opened to see that they can be read.

    Raises:
        ValueError: a file is missing, empty or invalid; names it and what was expected.
    """
    found: list[Part] = []
    for uri in _source_files(data):
        found += _parts_of(uri, data.text_column, None if data.heldout is None else False)
    for uri in find_text(data.heldout, "data.heldout") if data.heldout else []:
        found += _parts_of(uri, data.text_column, True)
    train = {part.uri for part in found if part.heldout is False}
    heldout = {part.uri for part in found if part.heldout}
    if in_both := train & heldout:
        raise ValueError(
            f"data.heldout: {min(in_both)} is in data.source too: a file is used for training or "
            "for evaluation, not for both"
        )
    return found


def find_text(patterns: list[str], key: str) -> list[str]:
    """Return the URIs of the files that paths, folders, globs or URIs name, sorted, each once.

    Args:
        patterns: what to look for.
        key: the config key that holds the patterns, for error messages.

    Raises:
        ValueError: nothing matches, a folder holds a file that is not text, or a file is empty.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            matches = find_files(pattern, SUFFIXES)
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}: {error}") from None
        if not matches:
            raise ValueError(
                f"{key}: there are no files at {pattern}: expected a file, a folder or a glob of "
                f"{', '.join(SUFFIXES)}, or 'shakespeare'"
            )
        found |= matches.keys()
    for uri in found:
        if storage.is_empty(uri):
            raise ValueError(f"{key}: {uri} is empty: remove it, or name the files without it")
    return sorted(found)


def _source_files(data: TextData) -> list[str]:
    if data.source == ["shakespeare"]:
        return [str(shipped("shakespeare.parquet"))]
    if len(data.source) == 1 and data.source[0].startswith("hf:"):
        folder = download_parquet(data.source[0].removeprefix("hf:"))
        return find_text([str(folder)], "data.source")
    return find_text(data.source, "data.source")


def _parts_of(uri: str, column: str, heldout: bool | None) -> list[Part]:
    if heldout is None and Path(uri).parent.name in HELDOUT_NAMES:
        heldout = True  # the hub's files are CONFIG/SPLIT/NNNN.parquet
    if not uri.lower().endswith(".parquet"):
        return [Part(uri, None, heldout)]
    file = open_parquet(uri)
    names = file.schema_arrow.names
    if column not in names:
        raise ValueError(f"{uri} has no column {column!r}: data.text_column must be one of {names}")
    if file.metadata.num_rows == 0:
        raise ValueError(f"{uri} has no rows: remove it, or name the files without it")
    return [Part(uri, group, heldout) for group in range(file.num_row_groups)]


# ---- reading


def read_documents(part: Part, data: TextData) -> Iterator[tuple[str, bool]]:
    """Yield the cleaned documents of a part, each with whether it is held out.

    Raises:
        ValueError: the part cannot be read; names the file, the line or row, and what was
            expected.
    """
    for text, heldout in _read(part, data):
        text = clean(text)
        if not text:
            continue
        if heldout is not None:
            yield text, heldout
        elif part.uri.lower().endswith((".txt", ".md")):
            # A file is one document, often the only one: its end is held out.
            end = _heldout_start(text, data.heldout_fraction)
            yield text[:end], False
            yield text[end:], True
        else:
            # Decided by content, so that neither the order of the documents nor other documents
            # move one to the other split.
            digest = hashlib.sha256(text.encode()).digest()
            yield text, int.from_bytes(digest[:8], "big") / 2**64 < data.heldout_fraction


def _heldout_start(text: str, fraction: float) -> int:
    """Return where the last `fraction` of a text begins: after a line break, or a space, near
    there if there is one."""
    target, reach = int(len(text) * (1 - fraction)), int(len(text) * fraction / 2)
    for separator in ("\n", " "):
        position = text.rfind(separator, target - reach, target + reach)
        if position > 0:
            return position + 1
    return target


def _read(part: Part, data: TextData) -> Iterator[tuple[str, bool | None]]:
    """Yield the documents as they are in the file, each with whether the data holds it out."""
    if part.uri.lower().endswith(".parquet"):
        yield from _read_rows(part, data)
        return
    try:
        text = storage.read_bytes(part.uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{part.uri} is not UTF-8 text (byte {error.start}): convert it, e.g. with "
            "iconv -f latin1 -t utf-8"
        ) from None
    if not part.uri.lower().endswith(".jsonl"):
        yield text, part.heldout
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _parse_line(line, f"{part.uri}: line {number}", data), part.heldout


def _read_rows(part: Part, data: TextData) -> Iterator[tuple[str, bool | None]]:
    filesystem, path = storage.locate(part.uri)
    file = pq.ParquetFile(path, filesystem=filesystem)
    columns = [data.text_column]
    if "split" in file.schema_arrow.names and data.text_column != "split":
        columns.append("split")
    try:
        rows = file.read_row_group(part.row_group, columns=columns).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{part.uri}: row group {part.row_group} cannot be read, the file is damaged: "
            f"{str(error).splitlines()[0]}"
        ) from None
    for index, row in enumerate(rows):
        text, split = row[data.text_column], row.get("split")
        if not isinstance(text, str):
            raise ValueError(
                f"{part.uri}: row {index} of row group {part.row_group} has no text in column "
                f"{data.text_column!r}"
            )
        unmarked = part.heldout is None and split is not None
        yield text, split in HELDOUT_NAMES if unmarked else part.heldout


def _parse_line(line: str, position: str, data: TextData) -> str:
    """Return the text of one line of a .jsonl file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError(
            f"{position} is not JSON: expected one object per line, with the text under "
            f"{data.text_column!r}"
        ) from None
    text = row.get(data.text_column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{position} has no text under {data.text_column!r}: see data.text_column")
    return text


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")


def clean(text: str) -> str:
    """Normalize to Unicode's NFC and "\\n" line ends, and drop control characters.

    Case, punctuation and white space are kept.
    """
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", unicodedata.normalize("NFC", unix))
