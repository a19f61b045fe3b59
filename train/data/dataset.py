"""What prepared text and prepared pictures share: how a source is recognised, and how a worker gets at what was prepared."""

import fnmatch
import os
import re
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from cluster import storage

HELDOUT_NAMES = {"heldout", "test", "val", "valid", "validation", "dev"}


def identity(uri: str) -> str:
    """What stands for a source file in a fingerprint: its hash where it lies on this machine, else its place, size and time."""
    local = storage.local_path(uri)
    if local is not None:
        return storage.sha256(local) + local.suffix
    filesystem, path = storage.locate(uri)
    info = filesystem.get_file_info(path)
    return f"{uri} {info.size} {info.mtime_ns}"


def fetch(uri: str) -> Path:
    """The data set's folder on this machine: the storage itself where it is mounted, else a copy made once a node."""
    local = storage.local_path(uri)
    if local is not None:
        return local
    copy = Path(tempfile.gettempdir()) / "raykiln-data" / uri.rstrip("/").rsplit("/", 1)[1]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):  # the other workers of this node wait for the one copy
        if not copy.is_dir():
            beside = tempfile.mkdtemp(dir=copy.parent)
            try:
                storage.download(uri, beside)
                os.rename(beside, copy)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return copy


def find_files(pattern: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The files that a name, a folder or a glob stands for, sorted; empty where there are none.

    Hidden files are skipped. In a glob, `*`, `?` and `[...]` stay within one name, `**` is any number of folders.

    Returns:
        {absolute URI: path below the folder, or below the last folder that the glob names in full}.

    Raises:
        ValueError: one of them has none of the (lower-case) suffixes.
    """
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    if fixed == pattern and storage.is_file(pattern):
        found = {storage.absolute(pattern): os.path.basename(pattern)}
    else:
        folder = pattern if fixed == pattern else os.path.dirname(fixed)
        wanted = "**" if fixed == pattern else pattern.removeprefix(folder).lstrip("/")
        below = [
            inside
            for inside in sorted(storage.files(folder))
            if not any(name.startswith(".") for name in inside.split("/"))
        ]
        root = storage.absolute(folder)
        found = {
            storage.join(root, inside): inside
            for inside in below
            if _fits(inside.split("/"), wanted.split("/"))
        }
    for uri in found:
        if not uri.lower().endswith(suffixes):
            raise ValueError(
                f"{uri} is not one of the files expected here ({', '.join(suffixes)}): "
                f"move it away, or name the others by a glob such as 'folder/*{suffixes[0]}'"
            )
    return found


def _fits(names: list[str], wanted: list[str]) -> bool:
    """Whether a path fits a glob, name by name: fnmatch's `*` alone would cross folders."""
    if not wanted:
        return not names
    if wanted[0] == "**":
        return any(_fits(names[start:], wanted[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], wanted[0]) and _fits(names[1:], wanted[1:])
