"""Tokenize and pack text once, and read it in windows.

    dataset = text.prepare(config.data, storage)
    tokens = text.Tokens(dataset, "train", context=128)
    windows = tokens.batch(order, positions)

A text data set is the folder <storage>/data/<name>-<fingerprint>/ with dataset.json (written last),
tokenizer.json and shards. A shard holds the documents of one file, or of one row group of a parquet
file, as uint16 or uint32 tokens, <|endoftext|> before each document. A split is its shards one
after the other.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import TypedDict, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cluster import storage
from train.config.data import TextData
from train.data.dataset import Dataset
from train.data.order import Order, rng
from train.data.sources import identity, name_of
from train.data.text_sources import Part, find_parts, read_documents
from train.data.tokenizer import build_tokenizer, end_of_text, tokenizer_file

FORMAT = 1  # part of the fingerprint: raise it when cleaning, splitting or packing changes
SPLITS = ("train", "heldout")
EPOCH_OFFSET = 1  # purpose of a random draw: part of its key
NO_TARGET = -100  # cross entropy skips it

Ids = npt.NDArray[np.int64]


class Shard(TypedDict):
    """What dataset.json says about a shard."""

    file: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str


class Split(TypedDict):
    """What dataset.json says about a split: totals, and its shards."""

    tokens: int
    documents: int
    text_bytes: int
    shards: list[Shard]


class Meta(TypedDict):
    """The content of dataset.json."""

    kind: str
    name: str
    fingerprint: str
    source: list[str]
    dtype: str
    """Of a token in the shards, e.g. uint16."""
    vocab_size: int
    eos_token_id: int
    splits: dict[str, Split]


class _Task(TypedDict):
    """A row of the Ray Data pipeline: a `Part` and its position."""

    index: int
    uri: str
    row_group: int | None
    heldout: bool | None


class _Given(TypedDict):
    """The arguments of `_pack` that are the same for all tasks."""

    data: dict[str, object]
    uri: str
    tokenizer: str


def meta_of(dataset: Dataset) -> Meta:
    """Return the dataset.json of a data set of text."""
    return cast(Meta, dataset.meta)


# ---- preparing


def prepare(data: TextData, root: str) -> Dataset:
    """Return the packed data set; pack it with Ray Data where it is not on storage yet.

    Ray must be connected.

    Args:
        data: the config's section.
        root: the storage, a folder or URI.

    Raises:
        ValueError: a source is missing, empty or invalid; names the file and what was expected.
    """
    parts = find_parts(data)
    digest = fingerprint(data, parts)
    name = name_of(data.source, "text")
    uri = storage.join(root, "data", f"{name}-{digest}")
    if (dataset := Dataset.find(uri)) is not None:
        return dataset
    tokenizer = build_tokenizer(data, parts)
    storage.write_bytes(storage.join(uri, "tokenizer.json"), tokenizer.to_str().encode())
    packed = _pack_all(parts, data, uri, tokenizer.to_str())
    splits = {split: _split(split, packed) for split in SPLITS}
    for split, totals in splits.items():
        if totals["tokens"] < 2:
            raise ValueError(
                f"data.source {data.source}: the {split} split has no text: give more documents, "
                "data.heldout, or another data.heldout_fraction"
            )
    meta: Meta = {
        "kind": "text",
        "name": name,
        "fingerprint": digest,
        "source": data.source,
        "dtype": _dtype(tokenizer).name,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": end_of_text(tokenizer),
        "splits": splits,
    }
    return Dataset.write(uri, meta)


def fingerprint(data: TextData, parts: list[Part]) -> str:
    """Return 12 hex digits that change with the text, its cleaning, the split and the tokenizer."""
    digest = hashlib.sha256(f"text {FORMAT}".encode())
    for uri in sorted({part.uri for part in parts}):
        digest.update(identity(uri).encode())
    rules = data.model_dump(exclude={"source", "heldout"})
    rules["heldout"] = [part.heldout for part in parts]
    digest.update(json.dumps(rules, sort_keys=True).encode())
    if (file := tokenizer_file(data)) is not None:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _pack_all(
    parts: list[Part], data: TextData, uri: str, tokenizer: str
) -> list[dict[str, Shard]]:
    """Write the shards of all parts; return those of each part by split."""
    tasks: list[_Task] = [
        {"index": index, "uri": part.uri, "row_group": part.row_group, "heldout": part.heldout}
        for index, part in enumerate(parts)
    ]
    given: _Given = {"data": data.model_dump(), "uri": uri, "tokenizer": tokenizer}
    # One part is packed here: Ray Data would take seconds to start its processes.
    packed = [_pack(tasks[0], **given)] if len(tasks) == 1 else _pack_with_ray_data(tasks, given)
    rows = [json.loads(row["packed"]) for row in packed]
    for row in rows:
        if "error" in row:
            raise ValueError(row["error"])
    return [row["shards"] for row in sorted(rows, key=lambda row: int(row["index"]))]


def _pack_with_ray_data(tasks: list[_Task], given: _Given) -> list[dict[str, str]]:
    """Call `_pack` on each task, on all CPUs of the cluster."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # its progress bar is enough
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    packed = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        _pack,  # type: ignore[arg-type]  # its annotation does not know of fn_kwargs
        fn_kwargs=dict(given),
    )
    rows: list[dict[str, str]] = packed.take_all()
    return rows


def _pack(task: _Task, data: dict[str, object], uri: str, tokenizer: str) -> dict[str, str]:
    """Tokenize one part and write its shards; the function of a Ray Data task.

    Args:
        task: the part's fields and its index.
        data: the config's section.
        uri: the data set's folder.
        tokenizer: as JSON.

    Returns:
        {"packed": JSON}, of {"index", "shards"} or {"error"}: JSON because Arrow rows all have the
        same fields, an error as a value because Ray would wrap an exception in its traceback.
    """
    encoder = Tokenizer.from_str(tokenizer)
    encoder.no_truncation()  # a pretrained tokenizer may come with its model's limits
    encoder.no_padding()
    index, group = int(task["index"]), task["row_group"]
    part = Part(task["uri"], None if group is None else int(group), task["heldout"])
    try:
        tokens, text_bytes = _tokenize(part, TextData.model_validate(data), encoder)
    except (ValueError, OSError) as error:
        return {"packed": json.dumps({"error": str(error)})}
    shards: dict[str, Shard] = {}
    for split, documents in tokens.items():
        if not documents:
            continue
        stream = np.concatenate(documents)
        content, file = stream.tobytes(), f"{split}-{index:05d}.bin"
        storage.write_bytes(storage.join(uri, file), content)
        shards[split] = {
            "file": file,
            "tokens": len(stream),
            "documents": len(documents),
            "text_bytes": text_bytes[split],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    return {"packed": json.dumps({"index": index, "shards": shards})}


def _tokenize(
    part: Part, data: TextData, encoder: Tokenizer
) -> tuple[dict[str, list[np.ndarray]], dict[str, int]]:
    """Return the tokens of each document and the bytes of text, both by split."""
    end, dtype = end_of_text(encoder), _dtype(encoder)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    for text, heldout in read_documents(part, data):
        split = "heldout" if heldout else "train"
        ids = encoder.encode(text, add_special_tokens=False).ids
        tokens[split].append(np.array([end, *ids], dtype))
        text_bytes[split] += len(text.encode())
    return tokens, text_bytes


def _split(split: str, packed: list[dict[str, Shard]]) -> Split:
    shards = [part[split] for part in packed if split in part]
    return {
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "text_bytes": sum(shard["text_bytes"] for shard in shards),
        "shards": shards,
    }


def _dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)


# ---- reading


class Tokens:
    """Windows of tokens of one split, whose memory-mapped shards are read as one stream.

    Args:
        dataset: a prepared data set of text.
        split: "train" or "heldout".
        context: tokens that the model sees at once (T).

    Raises:
        ValueError: a shard is missing or has the wrong size.
    """

    def __init__(self, dataset: Dataset, split: str, context: int) -> None:
        folder = dataset.fetch()
        self.meta = meta_of(dataset)
        self.split = self.meta["splits"][split]
        self.context = context
        dtype = np.dtype(self.meta["dtype"])
        self.shards: list[np.ndarray] = []
        for shard in self.split["shards"]:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["tokens"] * dtype.itemsize:
                raise ValueError(
                    f"{file} is missing or truncated: delete {folder} and it will be prepared again"
                )
            self.shards.append(np.memmap(file, dtype, "r"))
        self._starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        """The number of windows of an epoch."""
        # One less than fits: each epoch shifts all windows by an offset below `context`.
        return max((self._length - 1) // self.context - 1, 0)

    def batch(self, order: Order, positions: Ids) -> Ids:
        """Return the windows at global positions.

        Args:
            order: of `len(self)` samples.
            positions: (B).

        Returns:
            (B, T + 1); inputs are [:, :-1], targets [:, 1:].
        """
        epochs = positions // order.num_samples
        offsets = {
            epoch: int(rng(order.seed, int(epoch), EPOCH_OFFSET).integers(self.context))
            for epoch in np.unique(epochs)
        }
        samples = order.samples(positions)
        windows = [
            self._read(int(sample) * self.context + offsets[epoch])
            for sample, epoch in zip(samples, epochs, strict=True)
        ]
        return np.stack(windows)

    @property
    def num_windows(self) -> int:
        """How many windows `every_window` yields over all workers."""
        return -(-(self._length - 1) // self.context)

    def padding(self) -> tuple[Ids, Ids]:
        """Return inputs and targets, (T) each, of a window of which no token is evaluated."""
        return np.zeros(self.context, np.int64), np.full(self.context, NO_TARGET, np.int64)

    def every_window(self, rank: int, world_size: int) -> Iterator[tuple[Ids, Ids]]:
        """Yield this worker's windows; those of all workers predict every token but the first once.

        Yields:
            Inputs and targets, (T) each. The last window is padded, and its targets beyond the end
            of the split are -100 (not evaluated).
        """
        for start in range(rank * self.context, self._length - 1, world_size * self.context):
            window = self._read(start)
            inputs, targets = self.padding()
            inputs[: len(window) - 1], targets[: len(window) - 1] = window[:-1], window[1:]
            yield inputs, targets

    @property
    def _length(self) -> int:
        """The number of tokens of the split."""
        return int(self._starts[-1])

    def _read(self, start: int) -> Ids:
        """Return up to T + 1 tokens from index `start` of the stream."""
        parts, left = [], self.context + 1
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while left and shard < len(self.shards):
            parts.append(self.shards[shard][start - int(self._starts[shard]) :][:left])
            start, left, shard = start + len(parts[-1]), left - len(parts[-1]), shard + 1
        return np.concatenate(parts).astype(np.int64)
