"""Text: found, checked, cleaned without being maimed, tokenised and packed once, then read memory-mapped.

    dataset = prepare(config.data, storage)      # <storage>/data/<name>-<fingerprint>/: dataset.json, tokenizer.json, shards
    tokens = Tokens(dataset, "train", context=128)

A shard is one file (or one parquet row group) of the source: <|endoftext|> before each document, as uint16
or uint32; a split is its shards one after the other. `dataset.json` is written last: a data set without it does not exist.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from cluster import storage
from train.config.data import TextData
from train.data.dataset import Dataset
from train.data.order import Order, rng
from train.data.shipped.files import gpt2_tokenizer, hub_parquet, shipped
from train.data.sources import HELDOUT_NAMES, find_files, identity, name_of

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
FORMAT = 1  # part of the fingerprint: raise it when cleaning, splitting or packing changes
TOKENIZER_SAMPLE_CHARS = (
    64_000_000  # more text does not change the merges of a small vocabulary noticeably
)


@dataclass(frozen=True)
class Piece:
    """What one task packs: a file, or one row group of a parquet file."""

    uri: str
    row_group: int | None
    heldout: bool | None  # None: the documents themselves, or the share, decide


# ---------------------------------------------------------------- finding and checking


def find(patterns: list[str], label: str) -> list[str]:
    """The files that names, folders, globs or URIs stand for, sorted, each once.

    Raises:
        ValueError: nothing matches, a folder holds something that is no text, or a file is empty.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            matches = find_files(pattern, SUFFIXES)
        except (ValueError, OSError) as error:
            raise ValueError(f"{label}: {error}") from None
        if not matches:
            raise ValueError(
                f"{label}: nothing is there at {pattern}: expected a file, a folder or a glob of {', '.join(SUFFIXES)}, or 'shakespeare'"
            )
        found |= matches.keys()
    for uri in found:
        if storage.is_empty(uri):
            raise ValueError(f"{label}: {uri} is empty: remove it, or name the files without it")
    return sorted(found)


def pieces(data: TextData) -> list[Piece]:
    """The source cut into pieces, each file opened far enough to know that it can be read.

    Raises:
        ValueError: names the file and what was expected of it.
    """
    found: list[Piece] = []
    for uri in _source_files(data):
        found += _pieces_of(uri, data.text_column, None if data.heldout is None else False)
    for uri in find(data.heldout, "data.heldout") if data.heldout else []:
        found += _pieces_of(uri, data.text_column, True)
    doubled = {p.uri for p in found if p.heldout is False} & {p.uri for p in found if p.heldout}
    if doubled:
        raise ValueError(
            f"data.heldout: {min(doubled)} is in data.source too: a file is trained on or judged on, not both"
        )
    return found


def _source_files(data: TextData) -> list[str]:
    if data.source == ["shakespeare"]:
        return [str(shipped("shakespeare.parquet"))]
    if len(data.source) == 1 and data.source[0].startswith("hf:"):
        return find([str(hub_parquet(data.source[0].removeprefix("hf:")))], "data.source")
    return find(data.source, "data.source")


def _pieces_of(uri: str, column: str, heldout: bool | None) -> list[Piece]:
    if heldout is None and Path(uri).parent.name in HELDOUT_NAMES:
        heldout = True  # the hub's data sets lie as CONFIG/SPLIT/NNNN.parquet
    if not uri.lower().endswith(".parquet"):
        return [Piece(uri, None, heldout)]
    filesystem, path = storage.locate(uri)
    try:
        file = pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{uri} is not a readable parquet file (truncated, or of another kind): {str(error).splitlines()[0]}"
        ) from None
    names = file.schema_arrow.names
    if column not in names:
        raise ValueError(f"{uri} has no column {column!r}: data.text_column must be one of {names}")
    if file.metadata.num_rows == 0:
        raise ValueError(f"{uri} has no rows: remove it, or name the files without it")
    return [Piece(uri, group, heldout) for group in range(file.num_row_groups)]


def documents(piece: Piece, data: TextData) -> Iterator[tuple[str, bool]]:
    """The cleaned documents of a piece, each with whether it is held out.

    Raises:
        ValueError: names the file, the line or row, and what was expected.
    """
    for text, heldout in _raw_documents(piece, data):
        text = clean(text)
        if not text:
            continue
        if heldout is not None:
            yield text, heldout
        elif piece.uri.lower().endswith((".txt", ".md")):
            # A file is one document, often the only one: its end is held out.
            cut = _cut(text, data.heldout_fraction)
            yield text[:cut], False
            yield text[cut:], True
        else:
            # By content, so that neither order nor other documents move one from side to side.
            place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
            yield text, place < data.heldout_fraction


def _cut(text: str, share: float) -> int:
    """Where the last `share` of a text begins: at a line, or a word, if one begins near there."""
    target, reach = int(len(text) * (1 - share)), int(len(text) * share / 2)
    for mark in ("\n", " "):
        place = text.rfind(mark, target - reach, target + reach)
        if place > 0:
            return place + 1
    return target


def _raw_documents(piece: Piece, data: TextData) -> Iterator[tuple[str, bool | None]]:
    filesystem, path = storage.locate(piece.uri)
    if piece.uri.lower().endswith(".parquet"):
        file = pq.ParquetFile(path, filesystem=filesystem)
        columns = [
            data.text_column,
            *(
                ["split"]
                if "split" in file.schema_arrow.names and data.text_column != "split"
                else []
            ),
        ]
        try:
            rows = file.read_row_group(piece.row_group, columns=columns).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{piece.uri}: row group {piece.row_group} can't be read, the file is damaged: {str(error).splitlines()[0]}"
            ) from None
        for place, row in enumerate(rows):
            if not isinstance(row[data.text_column], str):
                raise ValueError(
                    f"{piece.uri}: row {place} of row group {piece.row_group} has no text in column {data.text_column!r}"
                )
            split = row.get("split")
            yield (
                row[data.text_column],
                piece.heldout
                if split is None or piece.heldout is not None
                else split in HELDOUT_NAMES,
            )
        return
    try:
        text = storage.read_bytes(piece.uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{piece.uri} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv -f latin1 -t utf-8"
        ) from None
    if not piece.uri.lower().endswith(".jsonl"):
        yield text, piece.heldout
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(
                f"{piece.uri}: line {number} is not JSON: expected one object a line, with the text under {data.text_column!r}"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get(data.text_column), str):
            raise ValueError(
                f"{piece.uri}: line {number} has no text under {data.text_column!r}: see data.text_column"
            )
        yield row[data.text_column], piece.heldout


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")


def clean(text: str) -> str:
    """Unicode's composed normal form (NFC), plain line ends, no control characters; case and punctuation stay."""
    return _CONTROL.sub(
        "", unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    )


# ---------------------------------------------------------------- tokenizer


def tokenizer_for(data: TextData, found: list[Piece]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, trained on the training documents where it says "bpe".

    Raises:
        ValueError: it can't be loaded, or has no <|endoftext|>.
    """
    if data.tokenizer == "bpe":
        return _train_bpe(data, found)
    if data.tokenizer == "gpt2":
        return Tokenizer.from_str(gpt2_tokenizer())
    path = Path(data.tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer {data.tokenizer!r}: expected bpe, gpt2, or a folder or file with a tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ValueError(
            f"data.tokenizer: {file} is not a tokenizer.json of Hugging Face's tokenizers ({error})"
        ) from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ValueError(
            f"data.tokenizer: {file} has no {END_OF_TEXT}, which separates documents: add it as a special token"
        )
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the mark before each document."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    assert isinstance(token, int), token
    return token


def _train_bpe(data: TextData, found: list[Piece]) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): every string can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(data, found), trainer)
    return tokenizer


def _training_text(data: TextData, found: list[Piece]) -> Iterator[str]:
    left = TOKENIZER_SAMPLE_CHARS
    for piece in found:
        for text, heldout in documents(piece, data):
            if not heldout:
                yield text[:left]
                left -= len(text)
            if left <= 0:
                return


# ---------------------------------------------------------------- packing, once


def fingerprint(data: TextData, found: list[Piece]) -> str:
    """12 hex digits that change with the data, the cleaning, the split and the tokenizer."""
    digest = hashlib.sha256(f"text {FORMAT}".encode())
    for uri in sorted({piece.uri for piece in found}):
        digest.update(identity(uri).encode())
    rules = data.model_dump(exclude={"source", "heldout"}) | {
        "heldout": [piece.heldout for piece in found]
    }
    digest.update(json.dumps(rules, sort_keys=True).encode())
    tokenizer = Path(data.tokenizer)
    for file in (
        sorted(tokenizer.glob("tokenizer.json"))
        if tokenizer.is_dir()
        else [tokenizer]
        if tokenizer.is_file()
        else []
    ):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def prepare(data: TextData, root: str) -> Dataset:
    """Return the packed data set; pack it with Ray Data where it is not on storage yet.

    Ray must be connected.

    Raises:
        ValueError: the source is wrong, empty, truncated or mixed; names the file and what was expected.
    """
    found = pieces(data)
    mark = fingerprint(data, found)
    name = name_of(data.source, "text")
    uri = storage.join(root, "data", f"{name}-{mark}")
    if (found_dataset := Dataset.find(uri)) is not None:
        return found_dataset
    tokenizer = tokenizer_for(data, found)
    storage.write_bytes(storage.join(uri, "tokenizer.json"), tokenizer.to_str().encode())
    rows = _pack_all(found, data, uri, tokenizer.to_str())
    splits = {split: _totals(rows, split) for split in ("train", "heldout")}
    for split, totals in splits.items():
        if totals["tokens"] < 2:
            raise ValueError(
                f"data.source {data.source}: the {split} split has no text: give more documents, data.heldout, or another data.heldout_fraction"
            )
    meta = {
        "kind": "text",
        "name": name,
        "fingerprint": mark,
        "source": data.source,
        "dtype": _dtype(tokenizer).name,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": end_of_text(tokenizer),
        "splits": splits,
    }
    return Dataset.write(uri, meta)


def _pack_all(found: list[Piece], data: TextData, uri: str, tokenizer: str) -> list[dict[str, Any]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # the bar says enough
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    tasks = [{"place": place, **asdict(piece)} for place, piece in enumerate(found)]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        _pack,  # type: ignore[arg-type]  # its annotation does not know of fn_kwargs
        fn_kwargs={"data": data.model_dump(), "uri": uri, "tokenizer": tokenizer},
    )
    rows = [json.loads(row["packed"]) for row in dataset.take_all()]
    for row in rows:
        if "error" in row:
            raise ValueError(row["error"])
    return sorted(rows, key=lambda row: row["place"])


def _pack(task: dict[str, Any], data: dict[str, Any], uri: str, tokenizer: str) -> dict[str, str]:
    """Tokenises one piece into its shards. What is wrong comes back as a row: a traceback would hide the sentence."""
    encoder = Tokenizer.from_str(tokenizer)
    encoder.no_truncation()  # a pretrained tokenizer may bring its model's limits along
    encoder.no_padding()
    end = end_of_text(encoder)
    place = task["place"]
    piece = Piece(
        task["uri"], None if task["row_group"] is None else int(task["row_group"]), task["heldout"]
    )
    shards: dict[str, dict[str, Any]] = {}
    arrays: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    sizes = {"train": [0, 0], "heldout": [0, 0]}
    try:
        for text, heldout in documents(piece, TextData.model_validate(data)):
            split = "heldout" if heldout else "train"
            arrays[split].append(
                np.array(
                    [end, *encoder.encode(text, add_special_tokens=False).ids], _dtype(encoder)
                )
            )
            sizes[split][0] += 1
            sizes[split][1] += len(text.encode())
    except (ValueError, OSError) as error:
        return {"packed": json.dumps({"error": str(error)})}
    for split, parts in arrays.items():
        if not parts:
            continue
        content = np.concatenate(parts).tobytes()
        file = f"{split}-{place:05d}.bin"
        storage.write_bytes(storage.join(uri, file), content)
        shards[split] = {
            "file": file,
            "tokens": len(content) // _dtype(encoder).itemsize,
            "documents": sizes[split][0],
            "text_bytes": sizes[split][1],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    return {"packed": json.dumps({"place": int(place), "shards": shards})}


def _totals(rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
    shards = [row["shards"][split] for row in rows if split in row["shards"]]
    return {
        key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "text_bytes")
    } | {"shards": shards}


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)


# ---------------------------------------------------------------- reading


class Tokens:
    """Windows of `context` + 1 tokens of one split, whose shards are read as one stream, memory-mapped.

    Args:
        dataset: a prepared data set of text.
        split: "train" or "heldout".
        context: tokens that the model sees at once (T).

    Raises:
        ValueError: a shard is missing or of the wrong size.
    """

    def __init__(self, dataset: Dataset, split: str, context: int) -> None:
        folder = dataset.fetch()
        self.meta = dataset.meta
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
        # One window less than fits: each epoch shifts all windows by an offset below `context`.
        return max((int(self._starts[-1]) - 1) // self.context - 1, 0)

    def batch(self, order: Order, positions: np.ndarray) -> np.ndarray:
        """The windows at the global `positions`, (B, T + 1) int64: inputs are [:, :-1], targets [:, 1:]."""
        epochs = positions // order.num_samples
        offsets = {
            epoch: int(rng(order.seed, int(epoch), 1).integers(self.context))
            for epoch in np.unique(epochs)
        }
        samples = order.samples(positions)
        return np.stack(
            [
                self._read(int(sample) * self.context + offsets[epoch])
                for sample, epoch in zip(samples, epochs, strict=True)
            ]
        )

    @property
    def num_windows(self) -> int:
        """How many windows `every_window` yields over all workers."""
        return -(-(int(self._starts[-1]) - 1) // self.context)

    def padding(self) -> tuple[np.ndarray, np.ndarray]:
        """A window of which no token is judged."""
        return np.zeros(self.context, np.int64), np.full(self.context, -100, np.int64)

    def every_window(self, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This worker's share of windows that together predict every token but the first once: inputs and targets, (T) int64 each.

        The last window is short: it is padded, and its targets beyond the end are -100 (not judged).
        """
        for start in range(
            rank * self.context, int(self._starts[-1]) - 1, world_size * self.context
        ):
            window = self._read(start)
            inputs, targets = self.padding()
            inputs[: len(window) - 1], targets[: len(window) - 1] = window[:-1], window[1:]
            yield inputs, targets

    def _read(self, start: int) -> np.ndarray:
        """Up to T + 1 tokens from place `start` of the stream, int64."""
        parts, left = [], self.context + 1
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while left and shard < len(self.shards):
            parts.append(self.shards[shard][start - int(self._starts[shard]) :][:left])
            start, left, shard = start + len(parts[-1]), left - len(parts[-1]), shard + 1
        return np.concatenate(parts).astype(np.int64)
