"""What prepared text and prepared pictures share: how a source is recognised, and how a worker gets at what was prepared."""

import os
import tempfile
from pathlib import Path

from models import storage


def identity(uri: str) -> str:
    """What stands for a source file in a fingerprint: its hash where it lies on this machine, else its place, size and time."""
    local = storage.local_path(uri)
    if local is not None:
        return storage.sha256(local)
    filesystem, path = storage.locate(uri)
    info = filesystem.get_file_info(path)
    return f"{uri} {info.size} {info.mtime_ns}"


def fetch(uri: str) -> Path:
    """The data set's folder on this machine: the storage itself where it is mounted, else a copy made once a node."""
    local = storage.local_path(uri)
    if local is not None:
        return local
    copy = Path(tempfile.gettempdir()) / "raykiln-data" / uri.rstrip("/").rsplit("/", 1)[1]
    if not (copy / "dataset.json").is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(dir=copy.parent)
        storage.download(uri, beside)
        try:
            os.rename(beside, copy)
        except OSError:
            if not (copy / "dataset.json").is_file():  # else another worker of this node was first: its copy is the same
                raise
    return copy
