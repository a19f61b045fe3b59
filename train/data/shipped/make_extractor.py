"""Train the shipped feature extractor (six minutes on one core):
`python -m train.data.shipped.make_extractor SOURCE_FOLDER`.

SOURCE_FOLDER holds `fashion-mnist/train-{images-idx3,labels-idx1}-ubyte.gz`. The 10,000 images that
ship are left out of its training, so that a generator's training images and the held-out ones are
equally new to it. The last 500 of each class of the remaining 50,000 measure its accuracy.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cluster import storage
from train.config.data import ImageData
from train.data import images
from train.data.images import Images
from train.data.shipped.make import GARMENTS, HERE, IMAGES_PER_CLASS, read_garments, row_of
from train.gan import extractor_training
from train.gan.extractor_file import pack

FILE = HERE / "fashion-mnist-extractor.safetensors"
TEST_PER_CLASS = 500


def remaining(source: Path) -> pa.Table:
    """Return the images that do not ship: image (PNG bytes), label, class_name, split."""
    pixels, labels = read_garments(source)
    rows = []
    for label in range(len(GARMENTS)):
        indices = np.flatnonzero(labels == label)[IMAGES_PER_CLASS:]
        for position, index in enumerate(indices):
            split = "heldout" if position >= len(indices) - TEST_PER_CLASS else "train"
            rows.append(row_of(Image.fromarray(pixels[index]), label, GARMENTS, split))
    return pa.Table.from_pylist(rows)


def main(source: Path) -> None:
    """Train the extractor, and write it and its hash."""
    torch.set_num_threads(1)  # the same weights on any number of cores
    size = ImageData().size
    with tempfile.TemporaryDirectory() as scratch:
        pq.write_table(remaining(source / "fashion-mnist"), f"{scratch}/rest.parquet")
        rest = images.prepare(ImageData(source=[f"{scratch}/rest.parquet"]), scratch)
        extractor, card = extractor_training.train(rest, size)
        heldout = Images(images.prepare(ImageData(), scratch), "heldout", size)
        accuracy = extractor_training.accuracy(extractor, heldout, card.task)
    FILE.write_bytes(pack(extractor, card))
    hashes = storage.read_json(HERE / "sha256.json") | {FILE.name: storage.sha256(FILE)}
    (HERE / "sha256.json").write_text(json.dumps(hashes, indent=2) + "\n")
    print(
        f"{FILE.name}: {FILE.stat().st_size:,} bytes, {card}, and {accuracy:.1%} of the "
        f"{len(heldout):,} held-out images that ship"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.data.shipped.make_extractor SOURCE_FOLDER")
    main(Path(sys.argv[1]))
