"""Decode and resize images once, and read them in batches with augmentation.

    dataset = images.prepare(config.data, storage)
    train = images.Images(dataset, "train", config.data.size)
    pixels, labels = train.batch(order, positions)

A data set of images is the folder <storage>/data/<name>-<fingerprint>/ with dataset.json (written
last), train.npy and heldout.npy, and with train-labels.npy and heldout-labels.npy where there are
classes.
"""

import hashlib
import io
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from cluster import storage
from train.config.data import ImageData
from train.data.dataset import META, Dataset
from train.data.image_sources import Read, Source, find
from train.data.order import Order, rng
from train.data.sources import identity, name_of

# Part of the fingerprint: raise it when decoding, resizing, splitting or dataset.json changes.
FORMAT = 2
AUGMENTATION, HELDOUT = 1, 2  # purposes of random draws: parts of their keys
DECODE_AT_ONCE = 512

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]


class Split(TypedDict):
    """What dataset.json says about a split."""

    images: int
    sha256: dict[str, str]
    """By file."""


class Meta(TypedDict):
    """The content of dataset.json."""

    kind: str
    name: str
    fingerprint: str
    source: list[str]
    size: int
    """Height and width of the stored images in pixels."""
    channels: int
    classes: list[str]
    """By label; empty without classes."""
    splits: dict[str, Split]


def meta_of(dataset: Dataset) -> Meta:
    """Return the dataset.json of a data set of images."""
    return cast(Meta, dataset.meta)


# ---- preparing


def prepare(data: ImageData, root: str, conditional: bool = False) -> Dataset:
    """Return the prepared data set; decode it where it is not on storage yet.

    Args:
        data: the config's section.
        root: the storage, a folder or URI; the data set's URI is absolute.
        conditional: the model is conditioned on classes, so there must be some.

    Raises:
        ValueError: a source is missing, empty or invalid; names the file and what was expected.
    """
    source = find(data)
    if conditional and not source.classes:
        raise ValueError(
            f"model.conditional needs classes and data.source {', '.join(data.source)} gives none: "
            f"use class folders, a parquet column data.label_column ({data.label_column!r}) "
            "without gaps, or set model.conditional to false"
        )
    digest = fingerprint(source, data)
    name = name_of(data.source, "images")
    uri = storage.join(storage.absolute(root), "data", f"{name}-{digest}")
    if (dataset := Dataset.find(uri)) is not None:
        return dataset
    target = storage.local_path(uri)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=target and target.parent) as scratch:
        folder = Path(scratch) / "dataset"
        folder.mkdir()
        meta: Meta = {
            "kind": "images",
            "name": name,
            "fingerprint": digest,
            "source": data.source,
            "size": stored_size(data),
            "channels": data.channels,
            "classes": source.classes,
            "splits": _decode_all(source, data, folder),
        }
        _publish(folder, uri, meta)
    return Dataset.open(uri)


def fingerprint(source: Source, data: ImageData) -> str:
    """Return 12 hex digits that change with the images, their classes, the split and the size."""
    rules = {
        "size": stored_size(data),
        "channels": data.channels,
        "column": data.image_column,
        "classes": source.classes,
    }
    digest = hashlib.sha256(f"images {FORMAT} {json.dumps(rules, sort_keys=True)}".encode())
    for uri in source.files:
        digest.update(identity(uri).encode())
    digest.update(b"" if source.labels is None else source.labels.tobytes())
    digest.update(heldout_mask(source, data).tobytes())
    return digest.hexdigest()[:12]


def heldout_mask(source: Source, data: ImageData) -> npt.NDArray[np.bool_]:
    """Return which images are held out (N).

    A source that marks images of both splits decides itself. Otherwise a fraction of the images is
    drawn from their number alone, so that it is the same in every run.

    Raises:
        ValueError: one of the splits would be empty.
    """
    heldout = source.heldout
    if heldout is None or heldout.all() or not heldout.any():
        heldout = np.zeros(source.count, np.bool_)
        drawn = max(1, round(source.count * data.heldout_fraction))
        heldout[rng(HELDOUT, source.count).permutation(source.count)[:drawn]] = True
    if heldout.all() or not heldout.any():
        images = "1 image" if source.count == 1 else f"{source.count} images"
        raise ValueError(
            f"data.source {', '.join(data.source)} has {images}, {int(heldout.sum())} of them held "
            "out: both splits need some, so give more images or another data.heldout_fraction"
        )
    return heldout


def stored_size(data: ImageData) -> int:
    """Return height and width of the stored images in pixels: data.size, and an eighth more (at
    least 4) for random crops."""
    return data.size + (max(4, data.size // 8) if data.random_crop else 0)


def _decode_all(source: Source, data: ImageData, folder: Path) -> dict[str, Split]:
    """Write the images of both splits, (N, S, S, C) uint8, and their labels, (N) int64.

    Returns:
        What dataset.json says about each split.
    """
    size, channels = stored_size(data), data.channels
    heldout = heldout_mask(source, data)
    arrays = {
        split: np.lib.format.open_memmap(
            folder / f"{split}.npy", "w+", np.uint8, (int(count), size, size, channels)
        )
        for split, count in (("train", (~heldout).sum()), ("heldout", heldout.sum()))
    }
    written = dict.fromkeys(arrays, 0)
    bar = track(
        _decoded(source, size, channels),
        "images",
        source.count,
        console=Console(stderr=True),
        transient=True,
    )
    for image, is_heldout in zip(bar, heldout, strict=True):
        split = "heldout" if is_heldout else "train"
        arrays[split][written[split]] = image
        written[split] += 1
    for array in arrays.values():
        array.flush()
    if source.labels is not None:
        np.save(folder / "train-labels.npy", source.labels[~heldout])
        np.save(folder / "heldout-labels.npy", source.labels[heldout])
    return {
        split: {
            "images": len(array),
            "sha256": {
                file.name: storage.sha256(file) for file in sorted(folder.glob(f"{split}*.npy"))
            },
        }
        for split, array in arrays.items()
    }


def _decoded(source: Source, size: int, channels: int) -> Iterator[Pixels]:
    """Yield every image in order, decoded by threads: Pillow releases the GIL while it works."""

    def decode_one(item: tuple[str, Read]) -> Pixels:
        name, read = item
        return decode(read(), name, size, channels)

    contents = source.contents()
    with ThreadPoolExecutor() as threads:
        while batch := list(itertools.islice(contents, DECODE_AT_ONCE)):
            yield from threads.map(decode_one, batch)


def decode(content: bytes | Image.Image, name: str, size: int, channels: int) -> Pixels:
    """Decode an image, resize its shorter side to `size` with antialiasing, and keep the center.

    Transparent images are put on white; an EXIF orientation is applied.

    Args:
        content: encoded, or decoded by Pillow.
        name: for error messages.
        size: height and width of the result.
        channels: 1 (grayscale) or 3 (color).

    Returns:
        (size, size, channels).

    Raises:
        ValueError: it is not an image, is damaged, or has another number of channels.
    """
    try:
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
        image = ImageOps.exif_transpose(image)  # reads all of it
    except UnidentifiedImageError:
        reason = "its bytes have no known image format" if content else "it is empty"
        raise ValueError(f"{name} is not an image ({reason}): remove it") from None
    except Exception as error:  # Pillow raises half a dozen unrelated types for damaged bytes
        raise ValueError(f"{name} is a damaged image ({error}): remove or restore it") from None
    grayscale = image.mode in ("1", "L", "LA")
    if not grayscale and image.mode not in ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(
            f"{name} has pixels of Pillow's mode {image.mode}: save it with 8 bits per channel"
        )
    if grayscale != (channels == 1):
        kind, other = ("grayscale", 1) if grayscale else ("in color", 3)
        raise ValueError(
            f"{name} is {kind} while data.channels is {channels}: convert it, or set data.channels "
            f"to {other} if all images are {kind}"
        )
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if grayscale else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels)


def _publish(folder: Path, uri: str, meta: Meta) -> None:
    """Move a finished folder to `uri`: rename it, or upload it with dataset.json last."""
    target = storage.local_path(uri)
    if target is None:
        storage.upload(folder, uri)
        storage.write_json(storage.join(uri, META), meta)
        return
    storage.write_json(folder / META, meta)
    try:
        os.rename(folder, target)
    except OSError:
        if not (target / META).is_file():  # else another driver was first, with the same data set
            raise


# ---- reading


class Images:
    """One split of a prepared data set, memory-mapped.

    Args:
        dataset: a prepared data set of images.
        split: "train" or "heldout".
        size: height and width that the model sees, in pixels.
        horizontal_flip: `batch` mirrors each image with probability 1/2.

    Raises:
        ValueError: a file is missing or truncated.
    """

    def __init__(
        self, dataset: Dataset, split: str, size: int, horizontal_flip: bool = False
    ) -> None:
        folder = dataset.fetch()
        self.meta = meta_of(dataset)
        self.size, self.horizontal_flip = size, horizontal_flip
        stored, channels = self.meta["size"], self.meta["channels"]
        self.margin = stored - size
        count = self.meta["splits"][split]["images"]
        self.pixels: Pixels = _mapped(folder / f"{split}.npy", (count, stored, stored, channels))
        self.labels: Labels | None = None
        if self.meta["classes"]:
            self.labels = _mapped(folder / f"{split}-labels.npy", (count,))

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(
        self, order: Order, positions: Indices
    ) -> tuple[npt.NDArray[np.float32], Labels | None]:
        """Return the images at global positions, cropped and mirrored by draws that depend on the
        position alone.

        Args:
            order: of `len(self)` samples.
            positions: (B).

        Returns:
            (B, C, H, W) in [-1, 1], and the labels (B), None without classes.
        """
        samples = order.samples(positions)
        crops = np.empty((len(samples), self.size, self.size, self.pixels.shape[3]), np.uint8)
        for row, (sample, position) in enumerate(zip(samples, positions, strict=True)):
            draw = rng(order.seed, int(position), AUGMENTATION)
            top, left = draw.integers(self.margin + 1, size=2)
            crop = self.pixels[sample, top : top + self.size, left : left + self.size]
            crops[row] = crop[:, ::-1] if self.horizontal_flip and draw.random() < 0.5 else crop
        return to_model(crops), None if self.labels is None else self.labels[samples]

    def centered(self, samples: Indices | slice) -> npt.NDArray[np.float32]:
        """Return images by their indices without augmentation, (B, C, H, W) in [-1, 1]."""
        start, end = self.margin // 2, self.margin // 2 + self.size
        return to_model(self.pixels[samples, start:end, start:end])


def to_model(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Turn (B, H, W, C) in [0, 255] into (B, C, H, W) in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1


def _mapped(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array: np.ndarray | None = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # EOFError: it is empty
        array = None
    if array is None or array.shape != shape:
        raise ValueError(
            f"{file} is missing or truncated: delete {file.parent} and it will be prepared again"
        )
    return array
