"""Find images and check them without decoding them.

A source is "fashion-mnist", "emoji", torchvision:NAME, hf:NAME, or any number of folders, globs and
URIs of image files or of parquet files. Classes are the subfolders of a folder, and the label
column of a parquet file. A source can hold out images itself: by folders or files named test,
validation, ..., or by a column "split".
"""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster import storage
from train.config.data import ImageData
from train.data.hub import download_parquet
from train.data.shipped.files import shipped
from train.data.sources import HELDOUT_NAMES, find_files, open_parquet

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

SHIPPED = ("fashion-mnist", "emoji")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLIT_NAMES = {"train", *HELDOUT_NAMES}
BATCH = 512  # rows of a parquet file that are read at once

Read = Callable[[], bytes | Image.Image]
Label = int | str | None


@dataclass(frozen=True)
class Source:
    """Images that were found but not read yet (N).

    Row i of `labels` and `heldout` belongs to image i of `contents()`.
    """

    files: list[str]
    """URIs of what the fingerprint covers."""
    contents: Callable[[], Iterator[tuple[str, Read]]]
    """Yields each image's name, for messages, and the function that reads it."""
    count: int
    labels: npt.NDArray[np.int64] | None
    """(N), in [0, len(classes)); None without classes."""
    classes: list[str]
    heldout: npt.NDArray[np.bool_] | None
    """(N), as the source decides; None where it does not."""


def find(data: ImageData) -> Source:
    """Return the images that data.source names.

    Raises:
        ValueError: nothing is there, a file is not an image, or formats are mixed; names the file
            and what was expected.
    """
    first, alone = data.source[0], len(data.source) == 1
    if alone and first in SHIPPED:
        return _from_parquet([str(shipped(f"{first}.parquet"))], data)
    if alone and first.startswith("torchvision:"):
        return _from_torchvision(first.removeprefix("torchvision:"))
    if alone and first.startswith("hf:"):
        found = _find_files([str(download_parquet(first.removeprefix("hf:")))])
    else:
        found = _find_files(data.source)
    parquet = sorted(uri for uri in found if uri.lower().endswith(".parquet"))
    if parquet and len(parquet) < len(found):
        other = next(uri for uri in found if uri not in parquet)
        raise ValueError(
            f"data.source mixes parquet and other files: {other} beside {parquet[0]}; give one "
            "kind, e.g. by a glob 'folder/*.parquet'"
        )
    return _from_parquet(parquet, data) if parquet else _from_files(found)


def _find_files(patterns: list[str]) -> dict[str, str]:
    """Return {URI: path below the pattern's folder} of image and parquet files."""
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = find_files(pattern, (*SUFFIXES, ".parquet"))
        if not matches:
            raise ValueError(
                f"data.source: there are no images at {pattern}: expected a folder of class "
                "folders or of images, parquet files, 'fashion-mnist', 'emoji', torchvision:NAME "
                "or hf:NAME"
            )
        found |= matches
    return found


# ---- image files


def _from_files(found: dict[str, str]) -> Source:
    """Return images of one file each, given {URI: [split/][class/]name}."""
    folders = [path.split("/")[:-1] for path in found.values()]
    heldout = None
    if all(names and names[0] in SPLIT_NAMES for names in folders):
        heldout = np.array([names[0] in HELDOUT_NAMES for names in folders])
        folders = [names[1:] for names in folders]
    classes = sorted({names[0] for names in folders if names})
    if classes and not all(folders):
        stray = next(uri for uri, names in zip(found, folders, strict=True) if not names)
        raise ValueError(
            f"{stray} is beside the class folders {', '.join(classes[:5])}: move it into one of "
            "them"
        )
    index = {name: number for number, name in enumerate(classes)}
    return Source(
        files=list(found),
        contents=lambda: ((uri, partial(storage.read_bytes, uri)) for uri in found),
        count=len(found),
        labels=np.array([index[names[0]] for names in folders]) if classes else None,
        classes=classes,
        heldout=heldout,
    )


# ---- parquet files


def _from_parquet(files: list[str], data: ImageData) -> Source:
    """Return images of one row each: encoded bytes, or {bytes, path} as Hugging Face's datasets
    writes them."""
    labels: list[Label] = []
    splits: list[Label] = []
    class_names: dict[Label, str] = {}
    for uri in files:
        with _open_parquet(uri, data) as file:
            count = file.metadata.num_rows
            own = _column(file, uri, data.label_column) or [None] * count
            in_rows = zip(own, _column(file, uri, "class_name") or [], strict=False)
            class_names |= _names_in_schema(file.schema_arrow, data.label_column)
            class_names |= {label: str(name) for label, name in in_rows}
            labels += own
            splits += _column(file, uri, "split") or [_split_in_name(uri)] * count
    values = sorted(
        {label for label in labels if label is not None},
        key=lambda label: (str(type(label)), label),
    )
    has_classes = None not in labels
    index: dict[Label, int] = {label: number for number, label in enumerate(values)}
    return Source(
        files=files,
        contents=partial(_parquet_contents, files, data.image_column),
        count=len(labels),
        labels=np.array([index[label] for label in labels]) if has_classes else None,
        classes=[str(class_names.get(label, label)) for label in values] if has_classes else [],
        heldout=None if None in splits else np.array([split in HELDOUT_NAMES for split in splits]),
    )


def _open_parquet(uri: str, data: ImageData) -> pq.ParquetFile:
    """Open a parquet file of images.

    Raises:
        ValueError: it cannot be read, or has no images in data.image_column.
    """
    file = open_parquet(uri)
    schema = file.schema_arrow
    if data.image_column not in schema.names:
        raise ValueError(
            f"{uri} has no column {data.image_column!r}: data.image_column must be one of "
            f"{schema.names}"
        )
    kind = schema.field(data.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"{uri} holds {kind} in column {data.image_column!r}: expected the bytes of PNG or "
            "JPEG images (see data.image_column)"
        )
    if file.metadata.num_rows == 0:
        raise ValueError(f"{uri} has no rows: remove it, or name the files without it")
    return file


def _column(file: pq.ParquetFile, uri: str, name: str) -> list[Label] | None:
    """Return a column of integers or names, or None where the file has no such column."""
    if name not in file.schema_arrow.names:
        return None
    kind = file.schema_arrow.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_valid = (
        pa.types.is_integer,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_null,
    )
    if not any(check(kind) for check in is_valid):
        raise ValueError(
            f"{uri} holds {kind} in column {name!r}: expected an integer or a name in each row: "
            "change it, or name another in data.label_column"
        )
    try:
        values: list[Label] = file.read(columns=[name])[name].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{uri}: column {name!r} cannot be read, the file is damaged: "
            f"{str(error).splitlines()[0]}"
        ) from None
    return values


def _names_in_schema(schema: pa.Schema, column: str) -> dict[Label, str]:
    """Return the class names that Hugging Face's datasets keeps in the schema's metadata, by label.

    Each level of the metadata can be missing or null.
    """
    found = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return dict(enumerate(found or []))


def _split_in_name(uri: str) -> str | None:
    """Return the split in a file's folder (test/0000.parquet) or in its name
    (test-00000-of-00001.parquet), or None."""
    *_, folder, name = f"/{uri}".split("/")
    words = folder, re.split("[-_.]", name)[0]
    return next((word for word in words if word in SPLIT_NAMES), None)


def _parquet_contents(files: list[str], column: str) -> Iterator[tuple[str, Read]]:
    for uri in files:
        filesystem, path = storage.locate(uri)
        row = itertools.count()
        try:
            file = pq.ParquetFile(path, filesystem=filesystem)
            for batch in file.iter_batches(batch_size=BATCH, columns=[column]):
                for value in batch.column(0).to_pylist():
                    content = value["bytes"] if isinstance(value, dict) else value
                    yield f"{uri}, row {next(row)}", partial(bytes, content or b"")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{uri} cannot be read to its end, the file is damaged: "
                f"{str(error).splitlines()[0]}"
            ) from None


# ---- torchvision


def _from_torchvision(name: str) -> Source:
    """Return a data set of torchvision, downloaded once into torch's cache; its test split is held
    out.

    Raises:
        ValueError: torchvision has no such data set, or it cannot be downloaded.
    """
    import torch

    root = Path(torch.hub.get_dir()).parent / "datasets" / name
    train, test = _torchvision_splits(name, root)
    targets = [getattr(split, "targets", getattr(split, "labels", None)) for split in (train, test)]
    labels, classes = None, []
    if all(target is not None for target in targets):
        labels = np.concatenate([np.asarray(target) for target in targets]).astype(np.int64)
        classes = [str(label) for label in getattr(train, "classes", range(int(labels.max()) + 1))]
    return Source(
        files=[str(path) for path in sorted(root.rglob("*")) if path.is_file()],
        contents=lambda: (
            (f"{name} {split}[{index}]", partial(_image, dataset, index))
            for dataset, split in ((train, "train"), (test, "test"))
            for index in range(len(dataset))
        ),
        count=len(train) + len(test),
        labels=labels,
        classes=classes,
        heldout=np.repeat([False, True], [len(train), len(test)]),
    )


def _torchvision_splits(name: str, root: Path) -> "tuple[VisionDataset, VisionDataset]":
    """Download a data set; return its train and test splits."""
    import torchvision

    build = getattr(torchvision.datasets, name, None)
    parameters = inspect.signature(build).parameters if inspect.isclass(build) else {}
    required = {
        parameter.name for parameter in parameters.values() if parameter.default is parameter.empty
    }
    has_splits = "train" in parameters or "split" in parameters
    if build is None or "download" not in parameters or not has_splits or required - {"root"}:
        raise ValueError(
            f"data.source torchvision:{name}: torchvision downloads no data set of that name with "
            "a test split (e.g. torchvision:CIFAR10)"
        )
    splits: tuple[dict[str, Any], dict[str, Any]] = {"split": "train"}, {"split": "test"}
    if "train" in parameters:
        splits = {"train": True}, {"train": False}
    try:
        train, test = (build(root=str(root), download=True, **split) for split in splits)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data.source torchvision:{name} could not be downloaded into {root} ({error}): check "
            "the network, or give local files"
        ) from None
    except ImportError as error:
        raise ValueError(
            f"data.source torchvision:{name} needs a package that is not installed ({error}): "
            "install it, or give local files"
        ) from None
    return train, test


def _image(dataset: "VisionDataset", index: int) -> Image.Image:
    image: Image.Image = dataset[index][0]
    return image
