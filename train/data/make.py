"""Makes the shipped data from its sources: `python -m train.data.make SOURCE_FOLDER`.

SOURCE_FOLDER holds `shakespeare/*.md`, `fashion-mnist/train-{images-idx3,labels-idx1}-ubyte.gz` and
`gpt2-bpe/{vocab.json,merges.txt}`. The splits are columns of the files: fixed by the file, not by chance.
"""

import gzip
import hashlib
import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
HELDOUT_PLAYS = {"Hamlet", "Richard III", "The Tempest", "Twelfth Night"}
PICTURES_PER_CLASS, HELDOUT_PER_CLASS = 1000, 100
GARMENTS = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def plays(source: Path) -> pa.Table:
    """One row a play: title, text, split."""
    rows = []
    for file in sorted(source.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("#").strip()
        rows.append({"title": title, "text": text, "split": "heldout" if title in HELDOUT_PLAYS else "train"})
    missing = HELDOUT_PLAYS - {row["title"] for row in rows if row["split"] == "heldout"}
    if missing:
        raise ValueError(f"{source} lacks the held-out plays {sorted(missing)}")
    return pa.Table.from_pylist(rows)


def garments(source: Path) -> pa.Table:
    """The first 1,000 pictures of each class, the last 100 of which are held out: image (PNG bytes), label, class_name, split."""
    with gzip.open(source / "train-images-idx3-ubyte.gz") as file:
        _, count, height, width = struct.unpack(">IIII", file.read(16))
        images = np.frombuffer(file.read(), np.uint8).reshape(count, height, width)
    with gzip.open(source / "train-labels-idx1-ubyte.gz") as file:
        file.read(8)
        labels = np.frombuffer(file.read(), np.uint8)
    order = {label: np.flatnonzero(labels == label)[:PICTURES_PER_CLASS] for label in range(len(GARMENTS))}
    rows = []
    for place in range(PICTURES_PER_CLASS):  # classes in turn, so that any prefix of the file is balanced
        for label, indices in order.items():
            png = io.BytesIO()
            Image.fromarray(images[indices[place]]).save(png, "PNG", optimize=True)
            split = "heldout" if place >= PICTURES_PER_CLASS - HELDOUT_PER_CLASS else "train"
            rows.append({"image": png.getvalue(), "label": label, "class_name": GARMENTS[label], "split": split})
    return pa.Table.from_pylist(rows)


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
    pq.write_table(plays(source / "shakespeare"), HERE / "shakespeare.parquet", compression="zstd", compression_level=19, row_group_size=5)
    # PNG is compressed already; stored as it is.
    pq.write_table(
        garments(source / "fashion-mnist"), HERE / "fashion-mnist.parquet", compression="none", use_dictionary=["class_name", "split"]
    )
    # mtime=0: the same input gives the same bytes.
    (HERE / "gpt2-tokenizer.json.gz").write_bytes(gzip.compress(gpt2_tokenizer(source / "gpt2-bpe").encode(), 9, mtime=0))
    names = ["shakespeare.parquet", "fashion-mnist.parquet", "gpt2-tokenizer.json.gz"]
    digests = {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in names}
    (HERE / "sha256.json").write_text(json.dumps(digests, indent=2) + "\n")
    for name in names:
        print(f"{name}: {(HERE / name).stat().st_size:,} bytes, sha256 {digests[name]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.data.make SOURCE_FOLDER")
    main(Path(sys.argv[1]))
