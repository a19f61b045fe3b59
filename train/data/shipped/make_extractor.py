"""Trains the shipped data's extractor: `python -m train.data.shipped.make_extractor SOURCE_FOLDER` (six minutes on one core).

SOURCE_FOLDER holds `fashion-mnist/train-{images-idx3,labels-idx1}-ubyte.gz`. None of the 10,000 pictures that ship is
trained on, neither the held-out ones nor the others, so to the extractor a generator's training pictures are as new as
the held-out ones. Of the remaining 50,000 the last 500 of each class are kept aside to measure it too.
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
from models.images import png
from train.config.data import ImageData
from train.data import images
from train.data.images import Images
from train.data.shipped.make import GARMENTS, HERE, PICTURES_PER_CLASS, read_garments
from train.gan import extractor_training
from train.gan.extractor_file import pack

FILE = HERE / "fashion-mnist-extractor.safetensors"
ASIDE_PER_CLASS = 500


def remaining(source: Path) -> pa.Table:
    """The pictures that do not ship: image (PNG bytes), label, class_name, split."""
    pixels, labels = read_garments(source)
    rows = []
    for label, name in enumerate(GARMENTS):
        indices = np.flatnonzero(labels == label)[PICTURES_PER_CLASS:]
        for place, index in enumerate(indices):
            split = "heldout" if place >= len(indices) - ASIDE_PER_CLASS else "train"
            rows.append(
                {"image": png(pixels[index]), "label": label, "class_name": name, "split": split}
            )
    return pa.Table.from_pylist(rows)


def main(source: Path) -> None:
    torch.set_num_threads(1)  # the same weights on any number of cores
    with tempfile.TemporaryDirectory() as scratch:
        pq.write_table(remaining(source / "fashion-mnist"), f"{scratch}/rest.parquet")
        rest = images.prepare(ImageData(source=[f"{scratch}/rest.parquet"]), scratch)
        found, card = extractor_training.train(rest, ImageData().size)
        ours = Images(images.prepare(ImageData(), scratch), "heldout", ImageData().size)
        accuracy = extractor_training.accuracy(found, ours, card.task)
    FILE.write_bytes(pack(found, card))
    hashes = storage.read_json(HERE / "sha256.json")
    (HERE / "sha256.json").write_text(
        json.dumps({**hashes, FILE.name: storage.sha256(FILE)}, indent=2) + "\n"
    )
    print(
        f"{FILE.name}: {FILE.stat().st_size:,} bytes, {card}, and {accuracy:.1%} of the {len(ours):,} that ship"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.data.shipped.make_extractor SOURCE_FOLDER")
    main(Path(sys.argv[1]))
