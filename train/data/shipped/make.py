"""Make the shipped data: `python -m train.data.shipped.make SOURCE_FOLDER`.

SOURCE_FOLDER holds `shakespeare/*.md`, `fashion-mnist/train-{images-idx3,labels-idx1}-ubyte.gz`,
`emoji-noto-64/emoji.parquet` and `gpt2-bpe/{vocab.json,merges.txt}`. A column of each file holds
the split, so that no random draw decides it.
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
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
HELDOUT_PLAYS = {"Hamlet", "Richard III", "The Tempest", "Twelfth Night"}
IMAGES_PER_CLASS, HELDOUT_PER_CLASS = 1000, 100
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
# Unicode's groups that show things. Skin tones and flags, near copies of each other, fill the rest.
EMOJI = [
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
]


def plays(source: Path) -> pa.Table:
    """Return one row per play: title, text, split."""
    rows = []
    for file in sorted(source.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("#").strip()
        split = "heldout" if title in HELDOUT_PLAYS else "train"
        rows.append({"title": title, "text": text, "split": split})
    missing = HELDOUT_PLAYS - {row["title"] for row in rows if row["split"] == "heldout"}
    if missing:
        raise ValueError(f"{source} lacks the held-out plays {sorted(missing)}")
    return pa.Table.from_pylist(rows)


def read_garments(source: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return Fashion-MNIST's 60,000 training images (N, 28, 28) and their labels (N)."""
    with gzip.open(source / "train-images-idx3-ubyte.gz") as file:
        _, count, height, width = struct.unpack(">IIII", file.read(16))
        images = np.frombuffer(file.read(), np.uint8).reshape(count, height, width)
    with gzip.open(source / "train-labels-idx1-ubyte.gz") as file:
        file.read(8)
        labels = np.frombuffer(file.read(), np.uint8)
    return images, labels


def garments(source: Path) -> pa.Table:
    """Return the first 1,000 images of each class, the last 100 of which are held out.

    Columns: image (PNG bytes), label, class_name, split.
    """
    images, labels = read_garments(source)
    order = {
        label: np.flatnonzero(labels == label)[:IMAGES_PER_CLASS] for label in range(len(GARMENTS))
    }
    rows = []
    for index in range(IMAGES_PER_CLASS):  # one of each class in turn: any prefix is balanced
        split = "heldout" if index >= IMAGES_PER_CLASS - HELDOUT_PER_CLASS else "train"
        for label, indices in order.items():
            rows.append(row_of(Image.fromarray(images[indices[index]]), label, GARMENTS, split))
    return pa.Table.from_pylist(rows)


def emoji(source: Path) -> pa.Table:
    """Return Noto's images of `EMOJI` on white; every tenth of a class is held out.

    Columns: image (PNG bytes), label, class_name, split.
    """
    found = pq.read_table(source / "emoji.parquet", columns=["category", "png"]).to_pylist()
    by_class = [[row["png"] for row in found if row["category"] == name] for name in EMOJI]
    rows = []
    # One of each class in turn, as long as they last.
    for index, stored in enumerate(itertools.zip_longest(*by_class)):
        split = "heldout" if index % 10 == 9 else "train"
        for label, content in enumerate(stored):
            if content is not None:
                rows.append(row_of(_on_white(content), label, EMOJI, split))
    return pa.Table.from_pylist(rows)


def row_of(image: Image.Image, label: int, names: list[str], split: str) -> dict[str, object]:
    """Return the row of one image."""
    # The hashes of the shipped files depend on how Pillow is called here.
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return {"image": file.getvalue(), "label": label, "class_name": names[label], "split": split}


def _on_white(content: bytes) -> Image.Image:
    """Return an image as opaque RGB: some are stored in grayscale or with a palette."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def gpt2_tokenizer(source: Path) -> str:
    """Return GPT-2's byte-level BPE as the JSON of `tokenizers`."""
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
    """Write the files, and their hashes into sha256.json."""
    pq.write_table(
        plays(source / "shakespeare"),
        HERE / "shakespeare.parquet",
        compression="zstd",
        compression_level=19,
        row_group_size=5,
    )
    for name, table in (
        ("fashion-mnist", garments(source / "fashion-mnist")),
        ("emoji", emoji(source / "emoji-noto-64")),
    ):
        # PNG is compressed already.
        pq.write_table(
            table,
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
    known = json.loads((HERE / "sha256.json").read_text())  # of make_extractor.py's file too
    (HERE / "sha256.json").write_text(json.dumps(known | digests, indent=2) + "\n")
    for name in names:
        print(f"{name}: {(HERE / name).stat().st_size:,} bytes, sha256 {digests[name]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.data.shipped.make SOURCE_FOLDER")
    main(Path(sys.argv[1]))
