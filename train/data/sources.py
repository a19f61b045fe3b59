"""Find the source files of a data set and identify them."""

import fnmatch
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage

HELDOUT_NAMES = {"heldout", "test", "val", "valid", "validation", "dev"}


def identity(uri: str) -> str:
    """Return what represents a source file in a fingerprint: the hash of a local file, else its
    URI, size and modification time."""
    local = storage.local_path(uri)
    if local is not None:
        return storage.sha256(local) + local.suffix
    filesystem, path = storage.locate(uri)
    info = filesystem.get_file_info(path)
    return f"{uri} {info.size} {info.mtime_ns}"


def open_parquet(uri: str) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        ValueError: it cannot be read.
    """
    filesystem, path = storage.locate(uri)
    try:
        return pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{uri} is not a readable parquet file (truncated, or of another format): "
            f"{str(error).splitlines()[0]}"
        ) from None


def name_of(source: list[str], default: str) -> str:
    """Return a data set's name: the first source's stem, in lower-case letters, digits, dashes."""
    stem = Path(source[0].rstrip("/*")).stem
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower() or default


def find_files(pattern: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return the files that a path, a folder or a glob names, sorted; empty without a match.

    Hidden files are skipped. In a glob, `*`, `?` and `[...]` stay within one path component, `**`
    is any number of folders.

    Returns:
        {absolute URI: path below the folder, or below the glob's last folder without wildcards}.

    Raises:
        ValueError: a file has none of the (lower-case) suffixes.
    """
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    if fixed == pattern and storage.is_file(pattern):
        found = {storage.absolute(pattern): os.path.basename(pattern)}
    else:
        folder = pattern if fixed == pattern else os.path.dirname(fixed)
        glob = "**" if fixed == pattern else pattern.removeprefix(folder).lstrip("/")
        root = storage.absolute(folder)
        found = {
            storage.join(root, path): path
            for path in sorted(storage.files(folder))
            if not _is_hidden(path) and _matches(path.split("/"), glob.split("/"))
        }
    for uri in found:
        if not uri.lower().endswith(suffixes):
            raise ValueError(
                f"{uri} is not one of the files expected here ({', '.join(suffixes)}): "
                f"move it away, or name the others by a glob such as 'folder/*{suffixes[0]}'"
            )
    return found


def _is_hidden(path: str) -> bool:
    return any(name.startswith(".") for name in path.split("/"))


def _matches(names: list[str], glob: list[str]) -> bool:
    """Match component by component: fnmatch's `*` alone would cross folders."""
    if not glob:
        return not names
    if glob[0] == "**":
        return any(_matches(names[start:], glob[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], glob[0]) and _matches(names[1:], glob[1:])
