"""Train the extractor that ships with the data: `python -m train.data.shipped.make_extractor
SOURCE_FOLDER` (six minutes on one core).

SOURCE_FOLDER holds `fashion-mnist/train-{images-idx3,labels-idx1}-ubyte.gz`. The extractor is
trained on none of the 10,000 images that ship, neither on held-out nor on training images: a
generator's training images are as new to it as the held-out ones. Of the remaining 50,000 images
the last 500 of each class measure its accuracy.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster import storage
from train.config.data import ImageData
from train.data import images
from train.data.images import Images
from train.data.shipped.make import GARMENTS, HERE, PICTURES_PER_CLASS, read_garments
from train.gan import extractor_training
from train.gan.extractor_file import pack
from train.gan.film import png

FILE = HERE / "fashion-mnist-extractor.safetensors"
HELDOUT_PER_CLASS = 500


def remaining(source: Path) -> pa.Table:
    """Return the images that do not ship: image (PNG bytes), label, class_name, split."""
    pixels, labels = read_garments(source)
    rows = []
    for label, name in enumerate(GARMENTS):
        indices = np.flatnonzero(labels == label)[PICTURES_PER_CLASS:]
        for position, index in enumerate(indices):
            split = "heldout" if position >= len(indices) - HELDOUT_PER_CLASS else "train"
            rows.append(
                {"image": png(pixels[index]), "label": label, "class_name": name, "split": split}
            )
    return pa.Table.from_pylist(rows)


def main(source: Path) -> None:
    """Train the extractor, write its file, and update sha256.json."""
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
