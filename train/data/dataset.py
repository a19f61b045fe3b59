"""A prepared data set: its location and its metadata."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock

from cluster import storage

META = "dataset.json"


class ExtractorEntry(TypedDict):
    """The feature extractor that evaluates images (see `train.gan.extractor_file.Card`)."""

    uri: str
    sha256: str
    task: str
    accuracy: float
    heldout: int
    train: int
    classes: list[str]
    dataset: str


@dataclass(frozen=True)
class Dataset:
    """A prepared data set on storage.

    Attributes:
        uri: its folder.
        meta: the content of its dataset.json, which is written last: a folder without it holds no
            data set. Its type is `train.data.text.Meta` or `train.data.images.Meta`.
        extractor: the feature extractor that evaluates images of it, once there is one.
    """

    uri: str
    meta: Mapping[str, Any]
    extractor: ExtractorEntry | None = None

    @classmethod
    def open(cls, uri: str) -> "Dataset":
        """Read the data set at `uri`.

        Raises:
            FileNotFoundError: there is no dataset.json.
        """
        return cls(uri, storage.read_json(storage.join(uri, META)))

    @classmethod
    def find(cls, uri: str) -> "Dataset | None":
        """Return the data set at `uri`, or None."""
        return cls.open(uri) if storage.exists(storage.join(uri, META)) else None

    @classmethod
    def write(cls, uri: str, meta: Mapping[str, object]) -> "Dataset":
        """Complete the data set at `uri`, whose other files are there."""
        storage.write_json(storage.join(uri, META), meta)
        return cls(uri, meta)

    @property
    def name(self) -> str:
        """The name that its source gave it."""
        return str(self.meta["name"])

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change with the source data and with how they are prepared."""
        return str(self.meta["fingerprint"])

    def with_extractor(self, extractor: ExtractorEntry) -> "Dataset":
        """Return the data set with its extractor."""
        return replace(self, extractor=extractor)

    def fetch(self) -> Path:
        """Return its folder on this machine: on the storage where that is mounted, else a copy
        that is downloaded once per node."""
        local = storage.local_path(self.uri)
        if local is not None:
            return local
        name = self.uri.rstrip("/").rsplit("/", 1)[1]
        copy = Path(tempfile.gettempdir()) / "raykiln-data" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):  # the node's other workers wait for the one copy
            if not copy.is_dir():
                partial = tempfile.mkdtemp(dir=copy.parent)
                try:
                    storage.download(self.uri, partial)
                    os.rename(partial, copy)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        return copy
