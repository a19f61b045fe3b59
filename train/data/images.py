"""Pictures: found, checked, decoded and resized once, then read memory-mapped with augmentation drawn by position.

    dataset = prepare(config.data, storage)      # <storage>/data/<name>-<fingerprint>/: dataset.json, train.npy, heldout.npy, ...
    images = Images(dataset, "train", config.data.size)
    pixels, labels = images.batch(order, positions)

A folder's classes are its subfolders; a parquet file's are its label column. Held out are the pictures that the data
itself marks (folders or files named test, validation, ...; a column "split"), or else a share that the number of
pictures alone decides. `dataset.json` is written last: a data set without it does not exist.
"""

import hashlib
import inspect
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from cluster import storage
from train.config.data import ImageData
from train.data.dataset import META, Dataset
from train.data.order import Order, rng
from train.data.shipped.files import hub_parquet, shipped
from train.data.sources import HELDOUT_NAMES, find_files, identity, name_of

SHIPPED = ("fashion-mnist", "emoji")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMAT = 1  # part of the fingerprint: raise it when decoding, resizing or splitting changes
AUGMENTATION, HELDOUT = 1, 2  # purposes of random draws: what sets their keys apart
READ_AT_ONCE = 512  # pictures between a look at the progress bar


@dataclass(frozen=True)
class Source:
    """Pictures that were found but not read: row i of `labels` and `heldout` is the i-th of `contents()`."""

    files: list[str]
    """What the fingerprint covers, as URIs."""
    contents: Callable[[], Iterator[tuple[str, Callable[[], bytes | Image.Image]]]]
    """Each picture's name for people, and how to read it."""
    count: int
    labels: np.ndarray | None
    """(N) int64 in [0, len(classes)), None without classes."""
    classes: list[str]
    heldout: np.ndarray | None
    """(N) bool as the data marks them, None where it marks none."""


# ---------------------------------------------------------------- finding and checking


def find(data: ImageData) -> Source:
    """The pictures that `data.source` stands for, checked as far as that goes without decoding them.

    Raises:
        ValueError: nothing is there, something is no picture, kinds are mixed; names the file and what was expected.
    """
    first = data.source[0]
    if data.source in [[name] for name in SHIPPED]:
        return _from_parquet([str(shipped(f"{first}.parquet"))], data)
    if first.startswith("torchvision:") and len(data.source) == 1:
        return _from_torchvision(first.removeprefix("torchvision:"))
    places = (
        [str(hub_parquet(first.removeprefix("hf:")))]
        if first.startswith("hf:") and len(data.source) == 1
        else data.source
    )
    found: dict[str, str] = {}
    for place in places:
        matching = find_files(place, (*SUFFIXES, ".parquet"))
        if not matching:
            expected = "a folder of class folders or of pictures, parquet files, 'fashion-mnist', 'emoji', torchvision:NAME or hf:NAME"
            raise ValueError(f"data.source: there are no pictures at {place}: expected {expected}")
        found |= matching
    parquet = sorted(uri for uri in found if uri.lower().endswith(".parquet"))
    if parquet and len(parquet) < len(found):
        other = next(uri for uri in found if uri not in parquet)
        raise ValueError(
            f"data.source mixes parquet and other files: {other} beside {parquet[0]}; give one kind, e.g. by a glob 'folder/*.parquet'"
        )
    return _from_parquet(parquet, data) if parquet else _from_files(found)


def _from_files(found: dict[str, str]) -> Source:
    """Pictures one a file, as {URI: [split/][class/]name}."""
    parts = [inside.split("/")[:-1] for inside in found.values()]
    heldout = None
    if all(folders and folders[0] in {"train", *HELDOUT_NAMES} for folders in parts):
        heldout = np.array([folders[0] in HELDOUT_NAMES for folders in parts])
        parts = [folders[1:] for folders in parts]
    classes = sorted({folders[0] for folders in parts if folders})
    place = {name: index for index, name in enumerate(classes)}
    if classes and not all(parts):
        stray = next(uri for uri, folders in zip(found, parts, strict=True) if not folders)
        raise ValueError(
            f"{stray} lies beside the class folders {', '.join(classes[:5])}: move it into one of them"
        )
    return Source(
        files=list(found),
        contents=lambda: ((uri, partial(storage.read_bytes, uri)) for uri in found),
        count=len(found),
        labels=np.array([place[folders[0]] for folders in parts]) if classes else None,
        classes=classes,
        heldout=heldout,
    )


def _from_parquet(files: list[str], data: ImageData) -> Source:
    """Pictures one a row: encoded bytes, or {bytes, path} as Hugging Face's datasets write them."""
    labels: list[Any] = []
    splits: list[str | None] = []
    class_names: dict[Any, str] = {}
    for uri in files:
        with _open_parquet(uri, data) as file:
            count = file.metadata.num_rows
            own = _column(file, uri, data.label_column) or [None] * count
            class_names |= _class_names(file.schema_arrow, data.label_column) | dict(
                zip(own, _column(file, uri, "class_name") or [], strict=False)
            )
            labels += own
            splits += _column(file, uri, "split") or [_split_in_name(uri)] * count
    values = sorted(set(labels) - {None}, key=lambda value: (str(type(value)), value))
    labelled = None not in labels
    place = {value: index for index, value in enumerate(values)}
    return Source(
        files=files,
        contents=partial(_parquet_contents, files, data.image_column),
        count=len(labels),
        labels=np.array([place[label] for label in labels]) if labelled else None,
        classes=[str(class_names.get(value, value)) for value in values] if labelled else [],
        heldout=None if None in splits else np.array([split in HELDOUT_NAMES for split in splits]),
    )


def _open_parquet(uri: str, data: ImageData) -> pq.ParquetFile:
    filesystem, path = storage.locate(uri)
    try:
        file = pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{uri} is not a readable parquet file (truncated, or of another kind): {str(error).splitlines()[0]}"
        ) from None
    schema = file.schema_arrow
    if data.image_column not in schema.names:
        raise ValueError(
            f"{uri} has no column {data.image_column!r}: data.image_column must be one of {schema.names}"
        )
    kind = schema.field(data.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"{uri} holds {kind} in column {data.image_column!r}: expected the bytes of PNG or JPEG pictures (see data.image_column)"
        )
    if file.metadata.num_rows == 0:
        raise ValueError(f"{uri} has no rows: remove it, or name the files without it")
    return file


def _column(file: pq.ParquetFile, uri: str, name: str) -> list[Any] | None:
    """A column's numbers or names, None where the file has no such column."""
    if name not in file.schema_arrow.names:
        return None
    kind = file.schema_arrow.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(
        fits(kind)
        for fits in (
            pa.types.is_integer,
            pa.types.is_boolean,
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_null,
        )
    ):
        raise ValueError(
            f"{uri} holds {kind} in column {name!r}: expected a whole number or a name in each row: change it, or name another in data.label_column"
        )
    try:
        return file.read(columns=[name])[name].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{uri}: column {name!r} can't be read, the file is damaged: {str(error).splitlines()[0]}"
        ) from None


def _class_names(schema: pa.Schema, column: str) -> dict[Any, str]:
    """The names that Hugging Face's datasets keep beside numbered labels, in the schema's metadata: each level may be missing or null."""
    found = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return dict(enumerate(found or []))


def _split_in_name(uri: str) -> str | None:
    """The split that a file's folder (test/0000.parquet) or name (test-00000-of-00001.parquet) says."""
    *_, folder, name = f"/{uri}".split("/")
    return next(
        (
            word
            for word in (folder, re.split("[-_.]", name)[0])
            if word in {"train", *HELDOUT_NAMES}
        ),
        None,
    )


def _parquet_contents(files: list[str], column: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for uri in files:
        filesystem, path = storage.locate(uri)
        place = itertools.count()
        try:
            for batch in pq.ParquetFile(path, filesystem=filesystem).iter_batches(
                batch_size=READ_AT_ONCE, columns=[column]
            ):
                for value in batch.column(0).to_pylist():
                    content = value["bytes"] if isinstance(value, dict) else value
                    yield f"{uri}, row {next(place)}", partial(bytes, content or b"")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{uri} can't be read to its end, the file is damaged: {str(error).splitlines()[0]}"
            ) from None


def _from_torchvision(name: str) -> Source:
    """A data set of torchvision's, downloaded once into torch's cache; its test split is held out."""
    import torch
    import torchvision

    root = Path(torch.hub.get_dir()).parent / "datasets" / name
    build = getattr(torchvision.datasets, name, None)
    parameters = inspect.signature(build).parameters if inspect.isclass(build) else {}
    needed = {
        parameter.name for parameter in parameters.values() if parameter.default is parameter.empty
    }
    if (
        "download" not in parameters
        or not {"train", "split"} & set(parameters)
        or needed - {"root"}
    ):
        raise ValueError(
            f"data.source torchvision:{name}: torchvision downloads no data set of that name with a test split (e.g. torchvision:CIFAR10)"
        )
    sides: list[dict[str, Any]] = (
        [{"train": True}, {"train": False}]
        if "train" in parameters
        else [{"split": "train"}, {"split": "test"}]
    )
    try:
        sets = [build(root=str(root), download=True, **side) for side in sides]  # type: ignore[misc]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data.source torchvision:{name} could not be downloaded into {root} ({error}): check the network, or give local files"
        ) from None
    except ImportError as error:
        raise ValueError(
            f"data.source torchvision:{name} needs a package that is not installed ({error}): install it, or give local files"
        ) from None
    targets = [getattr(part, "targets", getattr(part, "labels", None)) for part in sets]
    labels = (
        None
        if any(target is None for target in targets)
        else np.concatenate([np.asarray(target) for target in targets]).astype(np.int64)
    )
    numbers = [] if labels is None else range(int(labels.max()) + 1)
    return Source(
        files=[str(path) for path in sorted(root.rglob("*")) if path.is_file()],
        contents=lambda: (
            (f"{name} {side}[{i}]", partial(_first, part, i))
            for part, side in zip(sets, sides, strict=True)
            for i in range(len(part))
        ),
        count=sum(map(len, sets)),
        labels=labels,
        classes=[str(name) for name in getattr(sets[0], "classes", numbers)]
        if labels is not None
        else [],
        heldout=np.repeat([False, True], [len(part) for part in sets]),
    )


def _first(pairs: Any, index: int) -> Image.Image:
    return pairs[index][0]


# ---------------------------------------------------------------- decoding, once


def stored_size(data: ImageData) -> int:
    """Pixels a side of the stored pictures: with random crops an eighth more than the model sees (at least 4)."""
    return data.size + (max(4, data.size // 8) if data.random_crop else 0)


def decode(content: bytes | Image.Image, where: str, size: int, channels: int) -> np.ndarray:
    """(size, size, channels) uint8: the shorter side resized to `size` with antialiasing, the centre of the longer kept.

    Transparent pictures are laid on white; a camera's rotation mark is obeyed.

    Raises:
        ValueError: it is no picture, is damaged, or is grey where colour is wanted or the other way round; names `where`.
    """
    try:
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
        image = ImageOps.exif_transpose(image)  # reads all of it
    except UnidentifiedImageError:
        raise ValueError(
            f"{where} is no picture ({'it is empty' if not content else 'its bytes are of no known format'}): remove it"
        ) from None
    except Exception as error:  # Pillow raises half a dozen unrelated types for damaged bytes
        raise ValueError(f"{where} is a damaged picture ({error}): remove or restore it") from None
    grey = image.mode in ("1", "L", "LA")
    if not grey and image.mode not in ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"{where} has pixels of kind {image.mode}: save it with 8 bits a channel")
    if grey != (channels == 1):
        kind, other = ("grey", 1) if grey else ("in colour", 3)
        raise ValueError(
            f"{where} is {kind} while data.channels is {channels}: convert it, or set data.channels to {other} if all pictures are {kind}"
        )
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = ImageOps.fit(
        image.convert("L" if grey else "RGB"), (size, size), Image.Resampling.BICUBIC
    )
    return np.asarray(image).reshape(size, size, channels)


def fingerprint(source: Source, data: ImageData) -> str:
    """12 hex digits that change with the pictures, their classes, the split and the size."""
    rules = {
        "size": stored_size(data),
        "channels": data.channels,
        "column": data.image_column,
        "classes": source.classes,
    }
    digest = hashlib.sha256(f"images {FORMAT} {json.dumps(rules, sort_keys=True)}".encode())
    for uri in source.files:
        digest.update(identity(uri).encode())
    for array in (source.labels, heldout_of(source, data)):
        digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()[:12]


def heldout_of(source: Source, data: ImageData) -> np.ndarray:
    """(N) bool: as the data marks both sides, or else a share drawn from the number of pictures alone, the same in every run.

    Raises:
        ValueError: there are too few pictures to train on some and hold out others.
    """
    heldout = source.heldout
    if heldout is None or heldout.all() or not heldout.any():
        heldout = np.zeros(source.count, bool)
        share = max(1, round(source.count * data.heldout_fraction))
        heldout[rng(HELDOUT, source.count).permutation(source.count)[:share]] = True
    if heldout.all() or not heldout.any():
        raise ValueError(
            f"data.source {', '.join(data.source)} has {source.count} picture{'s' * (source.count > 1)}, "
            f"{int(heldout.sum())} of them held out: some are needed on both sides, so give more or another data.heldout_fraction"
        )
    return heldout


def prepare(data: ImageData, root: str, conditional: bool = False) -> Dataset:
    """Return the prepared data set; decode it where it is not on storage yet.

    Args:
        data: what to prepare.
        root: the storage, e.g. "kiln"; the data set's URI is absolute.
        conditional: the model is told the classes, so there must be some.

    Raises:
        ValueError: the source is wrong, empty, truncated or mixed; names the file and what was expected.
    """
    source = find(data)
    if conditional and not source.classes:
        raise ValueError(
            f"model.conditional needs classes and data.source {', '.join(data.source)} gives none: "
            f"use class folders, a parquet column data.label_column ({data.label_column!r}) without gaps, or set model.conditional to false"
        )
    mark = fingerprint(source, data)
    name = name_of(data.source, "images")
    uri = storage.join(storage.absolute(root), "data", f"{name}-{mark}")
    if (found := Dataset.find(uri)) is not None:
        return found
    target = storage.local_path(uri)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=target and target.parent) as scratch:
        folder = Path(scratch) / "dataset"
        folder.mkdir()
        meta = {
            "kind": "images",
            "name": name,
            "fingerprint": mark,
            "source": data.source,
            "size": stored_size(data),
            "channels": data.channels,
            "classes": source.classes,
            "splits": _decode_all(source, data, folder),
        }
        _publish(folder, uri, meta)
    return Dataset.open(uri)


def _decode_all(source: Source, data: ImageData, folder: Path) -> dict[str, Any]:
    """Writes {train,heldout}.npy (N, S, S, C) uint8 and {train,heldout}-labels.npy (N) int64; what dataset.json says of them."""
    size, channels = stored_size(data), data.channels
    heldout = heldout_of(source, data)
    arrays = {
        side: np.lib.format.open_memmap(
            folder / f"{side}.npy", "w+", np.uint8, (int(count), size, size, channels)
        )
        for side, count in (("train", (~heldout).sum()), ("heldout", heldout.sum()))
    }
    places = dict.fromkeys(arrays, 0)
    bar = track(
        _decoded(source, size, channels),
        "pictures",
        source.count,
        console=Console(stderr=True),
        transient=True,
    )
    for picture, held in zip(bar, heldout, strict=True):
        side = "heldout" if held else "train"
        arrays[side][places[side]] = picture
        places[side] += 1
    for array in arrays.values():
        array.flush()
    if source.labels is not None:
        np.save(folder / "train-labels.npy", source.labels[~heldout])
        np.save(folder / "heldout-labels.npy", source.labels[heldout])
    return {
        side: {
            "images": len(array),
            "sha256": {
                file.name: storage.sha256(file) for file in sorted(folder.glob(f"{side}*.npy"))
            },
        }
        for side, array in arrays.items()
    }


def _decoded(source: Source, size: int, channels: int) -> Iterator[np.ndarray]:
    """Every picture in order, decoded by threads: Pillow gives up the interpreter's lock while it works."""

    def read(item: tuple[str, Callable[[], bytes | Image.Image]]) -> np.ndarray:
        where, content = item
        return decode(content(), where, size, channels)

    contents = source.contents()
    with ThreadPoolExecutor() as threads:
        while several := list(itertools.islice(contents, READ_AT_ONCE)):
            yield from threads.map(read, several)


def _publish(folder: Path, uri: str, meta: dict[str, Any]) -> None:
    """Puts a finished folder where the data set is looked for: whole by a rename, dataset.json last on an object store."""
    target = storage.local_path(uri)
    if target is None:
        storage.upload(folder, uri)
        storage.write_json(storage.join(uri, META), meta)
        return
    storage.write_json(folder / META, meta)
    try:
        os.rename(folder, target)
    except OSError:
        if not (target / META).is_file():  # else another driver was first: its data set is the same
            raise


# ---------------------------------------------------------------- reading


class Images:
    """One split of a prepared data set, memory-mapped.

    Args:
        dataset: a prepared data set of images.
        split: "train" or "heldout".
        size: pixels a side that the model sees.
        horizontal_flip: `batch` mirrors every other picture.

    Raises:
        ValueError: a file is missing or not what dataset.json says.
    """

    def __init__(
        self, dataset: Dataset, split: str, size: int, horizontal_flip: bool = False
    ) -> None:
        folder = dataset.fetch()
        self.meta = dataset.meta
        self.size, self.horizontal_flip = size, horizontal_flip
        self.margin = self.meta["size"] - size
        count = self.meta["splits"][split]["images"]
        self.pixels = _mapped(
            folder / f"{split}.npy",
            (count, self.meta["size"], self.meta["size"], self.meta["channels"]),
        )
        self.labels = (
            _mapped(folder / f"{split}-labels.npy", (count,)) if self.meta["classes"] else None
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, order: Order, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The pictures at the global `positions`, cut and mirrored by draws that depend on the position alone.

        Returns:
            (B, C, H, W) float32 in [-1, 1]; (B) int64 labels, None without classes.
        """
        samples = order.samples(positions)
        cut = np.empty((len(samples), self.size, self.size, self.pixels.shape[3]), np.uint8)
        for row, (sample, position) in enumerate(zip(samples, positions, strict=True)):
            draw = rng(order.seed, int(position), AUGMENTATION)
            top, left = draw.integers(self.margin + 1, size=2)
            picture = self.pixels[sample, top : top + self.size, left : left + self.size]
            cut[row] = picture[:, ::-1] if self.horizontal_flip and draw.random() < 0.5 else picture
        return to_model(cut), None if self.labels is None else self.labels[samples]

    def centered(self, samples: np.ndarray | slice) -> np.ndarray:
        """The pictures with these indices without augmentation, as in `batch`."""
        start = self.margin // 2
        return to_model(self.pixels[samples, start : start + self.size, start : start + self.size])


def to_model(pixels: np.ndarray) -> np.ndarray:
    """(B, H, W, C) uint8 as (B, C, H, W) float32 in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1


def _mapped(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # EOFError: it is empty
        array = None
    if array is None or array.shape != shape:
        raise ValueError(
            f"{file} is missing or truncated: delete {file.parent} and it will be prepared again"
        )
    return array
