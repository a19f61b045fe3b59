"""Text: found, checked, cleaned, tokenized, packed once and read in windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from cluster import storage
from train.config.data import TextData
from train.data import text
from train.data.dataset import Dataset
from train.data.order import Order
from train.data.shipped import files
from train.data.text_sources import clean, find_parts, find_text, read_documents
from train.data.tokenizer import build_tokenizer

VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


def data(*source: object, **values: Any) -> TextData:
    return TextData(source=[str(path) for path in source], vocab_size=300, **values)


def split_of(source: TextData) -> tuple[list[str], list[str]]:
    """Return the training documents and the held-out ones."""
    found = [pair for part in find_parts(source) for pair in read_documents(part, source)]
    return (
        [document for document, heldout in found if not heldout],
        [document for document, heldout in found if heldout],
    )


# ---- shipped


def test_column_of_the_shipped_plays_decides_the_split() -> None:
    train, heldout = split_of(TextData())
    assert (len(train), len(heldout)) == (34, 4)
    assert sorted(play.splitlines()[0] for play in heldout) == [
        "# Hamlet",
        "# Richard III",
        "# The Tempest",
        "# Twelfth Night",
    ]


def test_damaged_shipped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sha256.json").write_bytes((files.FOLDER / "sha256.json").read_bytes())
    (tmp_path / "shakespeare.parquet").write_bytes(b"half")
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    files.shipped.cache_clear()
    with pytest.raises(
        ValueError, match=r"shakespeare.parquet, which ships with raykiln, is missing or damaged"
    ):
        find_parts(TextData())
    files.shipped.cache_clear()


# ---- cleaning and tokenizers


def test_clean_normalizes_but_keeps_case_and_punctuation() -> None:
    assert (
        clean('Hello, WORLD! "Quotes"—dashes… (brackets) & 100%\tTab\n')
        == 'Hello, WORLD! "Quotes"—dashes… (brackets) & 100%\tTab\n'
    )
    assert clean("cafe\u0301") == "caf\u00e9"
    assert clean("a\r\nb\rc\x00\x07d\ufeff") == "a\nb\ncd"
    assert clean("日本語 🎭") == "日本語 🎭"


def test_trained_tokenizer_decodes_what_it_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(VERSE * 20)
    source = data(tmp_path / "a.txt")
    tokenizer = build_tokenizer(source, find_parts(source))
    for document in [VERSE, "unseen: Ωμέγα 日本 🎭\n\n  two  spaces", "   "]:
        assert tokenizer.decode(tokenizer.encode(document).ids) == document
    again = build_tokenizer(source, find_parts(source))
    assert again.to_str() == tokenizer.to_str()


def test_shipped_gpt2_tokenizer_gives_the_published_ids() -> None:
    source = TextData(tokenizer="gpt2")
    tokenizer = build_tokenizer(source, [])
    assert tokenizer.get_vocab_size() == 50257
    assert tokenizer.encode("Hello world").ids == [15496, 995]  # GPT-2's published ids
    assert tokenizer.encode("<|endoftext|>").ids == [50256]


# ---- sources


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    documents = [f"{VERSE}{number}\n" for number in range(40)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents)
    )
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=7)
    from_lines, from_rows = (
        split_of(data(tmp_path / name, heldout_fraction=0.2)) for name in ("a.jsonl", "a.parquet")
    )
    assert from_lines == from_rows
    assert sorted(from_lines[0] + from_lines[1]) == sorted(documents)
    assert 1 <= len(from_lines[1]) <= 20


def test_end_of_a_text_file_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(VERSE * 50)
    (train,), (heldout,) = split_of(data(tmp_path / "a.md", heldout_fraction=0.1))
    assert train + heldout == VERSE * 50
    assert train.endswith("\n")
    assert 0.05 < len(heldout) / len(VERSE * 50) < 0.15


def test_end_is_held_out_without_line_breaks_and_without_spaces(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("Title\n" + "word " * 2000)
    (train,), (heldout,) = split_of(data(tmp_path / "line.txt", heldout_fraction=0.1))
    assert 0.05 < len(heldout) / len(train + heldout) < 0.15
    (tmp_path / "solid.txt").write_text("x" * 1000)
    (train,), (heldout,) = split_of(data(tmp_path / "solid.txt", heldout_fraction=0.1))
    assert (len(train), len(heldout)) == (900, 100)


def test_folders_named_after_splits_decide_the_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        pq.write_table(pa.table({"text": [split]}), tmp_path / split / "0000.parquet")
    train, heldout = split_of(data(tmp_path, heldout_fraction=0.01))
    assert (train, heldout) == (["train"], ["test"])


def test_source_finds_each_text_once_and_may_not_contain_heldout_ones(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.txt", "sub/c.txt", ".hidden.txt"):
        (tmp_path / name).write_text(VERSE)
    assert len(find_text([str(tmp_path)], "data.source")) == 3
    assert len(find_text([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")], "data.source")) == 2
    train, heldout = split_of(data(tmp_path / "a.txt", heldout=[str(tmp_path / "b.txt")]))
    assert (train, heldout) == ([VERSE], [VERSE])
    with pytest.raises(ValueError, match=r"a\.txt is in data.source too"):
        find_parts(data(tmp_path / "*.txt", heldout=[str(tmp_path / "a.txt")]))


def test_truncation_of_a_pretrained_tokenizer_is_ignored(ray_address: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(VERSE * 20)
    source = data(tmp_path / "a.txt")
    tokenizer = build_tokenizer(source, find_parts(source))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    dataset = text.prepare(
        data(tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json")),
        str(tmp_path / "store"),
    )
    assert dataset.meta["splits"]["train"]["tokens"] > 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty"),
        (
            "image.png",
            b"\x89PNG",
            r"image\.png is not one of the files expected here \(\.txt, \.md",
        ),
        ("latin.txt", "caf\xe9".encode("latin1"), r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', r"broken\.jsonl: line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', r"other\.jsonl: line 1 has no text under 'text'"),
        ("half.parquet", b"PAR1half", r"half\.parquet is not a readable parquet file"),
    ],
)
def test_invalid_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        split_of(data(tmp_path / name))


def test_invalid_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no files at .*/missing"):
        find_parts(data(tmp_path / "missing"))
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(
        ValueError,
        match=r"other\.parquet has no column 'text': data.text_column must be one of \['body'\]",
    ):
        find_parts(data(tmp_path / "other.parquet"))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"numbers\.parquet: row 0 of row group 0 has no text"):
        split_of(data(tmp_path / "numbers.parquet"))
    with pytest.raises(ValueError, match=r"data.tokenizer 'nowhere'"):
        build_tokenizer(data(tmp_path, tokenizer="nowhere"), [])


def test_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [VERSE] * 500}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file \(truncated"):
        find_parts(data(tmp_path / "a.parquet"))


# ---- packing and reading


@pytest.fixture(scope="module")
def packed(
    ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextData, str, Dataset]:
    """A small corpus of two files, the storage, and the packed data set."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("".join(f"{number}: {VERSE}" for number in range(100)))
    (folder / "b.txt").write_text("".join(f"{VERSE}{number}!\n" for number in range(60)))
    source, root = data(folder), str(tmp_path_factory.mktemp("store"))
    return source, root, text.prepare(source, root)


def test_packed_tokens_are_the_documents(packed: tuple[TextData, str, Dataset]) -> None:
    source, _, dataset = packed
    folder = dataset.fetch()
    meta = storage.read_json(folder / "dataset.json")
    assert meta == dataset.meta
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, documents in zip(("train", "heldout"), split_of(source), strict=True):
        shards = [
            np.fromfile(folder / shard["file"], meta["dtype"])
            for shard in meta["splits"][name]["shards"]
        ]
        assert [tokenizer.decode(list(shard[1:])) for shard in shards] == documents
        assert all(shard[0] == meta["eos_token_id"] for shard in shards)
        text_bytes = sum(len(document.encode()) for document in documents)
        assert meta["splits"][name]["text_bytes"] == text_bytes


def test_text_is_packed_once_per_fingerprint(packed: tuple[TextData, str, Dataset]) -> None:
    source, root, dataset = packed
    shard = Path(dataset.uri) / "train-00000.bin"
    before = shard.stat().st_mtime_ns
    assert text.prepare(source, root) == dataset
    assert shard.stat().st_mtime_ns == before
    found = find_parts(source)
    fingerprints = {
        text.fingerprint(source.model_copy(update=change), found)
        for change in ({}, {"vocab_size": 301}, {"heldout_fraction": 0.06})
    }
    assert len(fingerprints) == 3
    file = Path(source.source[0]) / "a.txt"
    original = file.read_text()
    file.write_text(original.replace("99:", "98:"))
    assert text.fingerprint(source, found) not in fingerprints
    file.write_text(original)


def test_invalid_file_ends_packing_with_its_message(
    packed: tuple[TextData, str, Dataset], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 30 + "bad\n")
    given = data(tmp_path / "a.jsonl", tokenizer="gpt2")
    with pytest.raises(ValueError, match=r"^.*a\.jsonl: line 31 is not JSON"):
        text.prepare(given, str(tmp_path / "store"))


def test_every_heldout_token_is_evaluated_once_at_any_number_of_workers(
    packed: tuple[TextData, str, Dataset],
) -> None:
    tokens = text.Tokens(packed[2], "heldout", context=16)
    expected = sorted(int(token) for token in np.concatenate(tokens.shards)[1:])
    for world_size in (1, 2, 3):
        windows = [
            window for rank in range(world_size) for window in tokens.every_window(rank, world_size)
        ]
        assert (
            sorted(int(target) for _, targets in windows for target in targets if target >= 0)
            == expected
        )
        assert all(len(inputs) == len(targets) == 16 for inputs, targets in windows)


@pytest.mark.parametrize("context", [16, 2000])  # within a shard, and across both
def test_windows_are_consecutive_tokens_shifted_in_each_epoch(
    packed: tuple[TextData, str, Dataset], context: int
) -> None:
    tokens = text.Tokens(packed[2], "train", context)
    order = Order(len(tokens), seed=1)
    stream = np.concatenate(tokens.shards).astype(np.int64)

    def starts(epoch: int) -> set[int]:
        windows = tokens.batch(order, np.arange(epoch * len(tokens), (epoch + 1) * len(tokens)))
        assert windows.shape == (len(tokens), context + 1)
        return {
            next(
                start
                for start in range(len(stream) - context)
                if np.array_equal(stream[start : start + context + 1], window)
            )
            for window in windows
        }

    assert starts(0) != starts(1)


def test_missing_shard_is_refused(packed: tuple[TextData, str, Dataset], tmp_path: Path) -> None:
    storage.download(packed[2].uri, tmp_path)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin is missing or truncated"):
        text.Tokens(Dataset.open(str(tmp_path)), "train", context=16)
