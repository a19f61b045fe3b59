"""Makes the shipped data from its sources: `python -m train.data.shipped.make SOURCE_FOLDER`.

SOURCE_FOLDER holds `shakespeare/*.md`, `fashion-mnist/train-{images-idx3,labels-idx1}-ubyte.gz`,
`emoji-noto-64/emoji.parquet` and `gpt2-bpe/{vocab.json,merges.txt}`. The splits are columns of the files: fixed by the file, not by chance.
"""

import gzip
import hashlib
import io
import itertools
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from models.images import png

HERE = Path(__file__).parent
HELDOUT_PLAYS = {"Hamlet", "Richard III", "The Tempest", "Twelfth Night"}
PICTURES_PER_CLASS, HELDOUT_PER_CLASS = 1000, 100
GARMENTS = [
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
# Those of Unicode's groups that show things; skin tones and flags would fill the rest with near copies.
EMOJI = [
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
]


def plays(source: Path) -> pa.Table:
    """One row a play: title, text, split."""
    rows = []
    for file in sorted(source.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("#").strip()
        rows.append(
            {
                "title": title,
                "text": text,
                "split": "heldout" if title in HELDOUT_PLAYS else "train",
            }
        )
    missing = HELDOUT_PLAYS - {row["title"] for row in rows if row["split"] == "heldout"}
    if missing:
        raise ValueError(f"{source} lacks the held-out plays {sorted(missing)}")
    return pa.Table.from_pylist(rows)


def read_garments(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's 60,000 training pictures (N, 28, 28) uint8 and their labels (N) uint8."""
    with gzip.open(source / "train-images-idx3-ubyte.gz") as file:
        _, count, height, width = struct.unpack(">IIII", file.read(16))
        images = np.frombuffer(file.read(), np.uint8).reshape(count, height, width)
    with gzip.open(source / "train-labels-idx1-ubyte.gz") as file:
        file.read(8)
        labels = np.frombuffer(file.read(), np.uint8)
    return images, labels


def garments(source: Path) -> pa.Table:
    """The first 1,000 pictures of each class, the last 100 of which are held out: image (PNG bytes), label, class_name, split."""
    images, labels = read_garments(source)
    order = {
        label: np.flatnonzero(labels == label)[:PICTURES_PER_CLASS]
        for label in range(len(GARMENTS))
    }
    rows = []
    for place in range(
        PICTURES_PER_CLASS
    ):  # classes in turn, so that any prefix of the file is balanced
        for label, indices in order.items():
            split = "heldout" if place >= PICTURES_PER_CLASS - HELDOUT_PER_CLASS else "train"
            rows.append(
                {
                    "image": png(images[indices[place]]),
                    "label": label,
                    "class_name": GARMENTS[label],
                    "split": split,
                }
            )
    return pa.Table.from_pylist(rows)


def emoji(source: Path) -> pa.Table:
    """Noto's pictures of `EMOJI` on white; every tenth of a class is held out: image (PNG bytes), label, class_name, split."""
    found = pq.read_table(source / "emoji.parquet", columns=["category", "png"]).to_pylist()
    by_class = [[row["png"] for row in found if row["category"] == name] for name in EMOJI]
    rows = []
    for place, pngs in enumerate(
        itertools.zip_longest(*by_class)
    ):  # classes in turn, as long as they last
        split = "heldout" if place % 10 == 9 else "train"
        for label, stored in enumerate(pngs):
            if stored is not None:
                rows.append(
                    {
                        "image": _on_white(stored),
                        "label": label,
                        "class_name": EMOJI[label],
                        "split": split,
                    }
                )
    return pa.Table.from_pylist(rows)


def _on_white(stored: bytes) -> bytes:
    """In colour and opaque: some are stored as grey ones or with a palette."""
    image = Image.open(io.BytesIO(stored)).convert("RGBA")
    return png(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def gpt2_tokenizer(source: Path) -> str:
    """GPT-2's byte-level BPE as one `tokenizers` JSON."""
    vocab = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = [
        (line.split(" ")[0], line.split(" ")[1])
        for line in (source / "merges.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#version")
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    assert tokenizer.get_vocab_size() == 50257, tokenizer.get_vocab_size()
    return tokenizer.to_str()


def main(source: Path) -> None:
    pq.write_table(
        plays(source / "shakespeare"),
        HERE / "shakespeare.parquet",
        compression="zstd",
        compression_level=19,
        row_group_size=5,
    )
    for name, pictures in (
        ("fashion-mnist", garments(source / "fashion-mnist")),
        ("emoji", emoji(source / "emoji-noto-64")),
    ):
        # PNG is compressed already; stored as it is.
        pq.write_table(
            pictures,
            HERE / f"{name}.parquet",
            compression="none",
            use_dictionary=["class_name", "split"],
        )
    # mtime=0: the same input gives the same bytes.
    (HERE / "gpt2-tokenizer.json.gz").write_bytes(
        gzip.compress(gpt2_tokenizer(source / "gpt2-bpe").encode(), 9, mtime=0)
    )
    names = [
        "shakespeare.parquet",
        "fashion-mnist.parquet",
        "emoji.parquet",
        "gpt2-tokenizer.json.gz",
    ]
    digests = {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in names}
    known = json.loads((HERE / "sha256.json").read_text())  # also of files that are made elsewhere
    (HERE / "sha256.json").write_text(json.dumps(known | digests, indent=2) + "\n")
    for name in names:
        print(f"{name}: {(HERE / name).stat().st_size:,} bytes, sha256 {digests[name]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.data.shipped.make SOURCE_FOLDER")
    main(Path(sys.argv[1]))
