"""Text is found, checked, cleaned without being maimed, packed once and read as it was written."""

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
from train.data.dataset import fetch
from train.data.order import Order

VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


def data(*source: object, **values: Any) -> TextData:
    return TextData(source=[str(path) for path in source], vocab_size=300, **values)


def held(source: TextData) -> tuple[list[str], list[str]]:
    found = [pair for piece in text.pieces(source) for pair in text.documents(piece, source)]
    return [words for words, heldout in found if not heldout], [
        words for words, heldout in found if heldout
    ]


# ---------------------------------------------------------------- shipped


def test_the_shipped_plays_are_split_by_the_file() -> None:
    train, heldout = held(TextData())
    assert (len(train), len(heldout)) == (34, 4)
    assert sorted(play.splitlines()[0] for play in heldout) == [
        "# Hamlet",
        "# Richard III",
        "# The Tempest",
        "# Twelfth Night",
    ]


def test_a_damaged_shipped_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.data.shipped import files as shipped

    (tmp_path / "sha256.json").write_bytes((shipped.FOLDER / "sha256.json").read_bytes())
    (tmp_path / "shakespeare.parquet").write_bytes(b"half")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped.shipped.cache_clear()
    with pytest.raises(
        ValueError, match=r"shakespeare.parquet, which ships with raykiln, is missing or damaged"
    ):
        text.pieces(TextData())
    shipped.shipped.cache_clear()


# ---------------------------------------------------------------- cleaning and tokens


def test_cleaning_keeps_case_punctuation_and_meaning() -> None:
    assert (
        text.clean('Hello, WORLD! "Quotes"—dashes… (brackets) & 100%\tTab\n')
        == 'Hello, WORLD! "Quotes"—dashes… (brackets) & 100%\tTab\n'
    )
    assert text.clean("cafe\u0301") == "caf\u00e9"
    assert text.clean("a\r\nb\rc\x00\x07d\ufeff") == "a\nb\ncd"
    assert text.clean("日本語 🎭") == "日本語 🎭"


def test_a_trained_tokenizer_encodes_anything_and_gives_it_back(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(VERSE * 20)
    source = data(tmp_path / "a.txt")
    tokenizer = text.tokenizer_for(source, text.pieces(source))
    for words in [VERSE, "unseen: Ωμέγα 日本 🎭\n\n  two  spaces", "   "]:
        assert tokenizer.decode(tokenizer.encode(words).ids) == words
    again = text.tokenizer_for(source, text.pieces(source))
    assert again.to_str() == tokenizer.to_str()


def test_gpt2s_tokenizer_ships() -> None:
    source = TextData(tokenizer="gpt2")
    tokenizer = text.tokenizer_for(source, [])
    assert tokenizer.get_vocab_size() == 50257
    assert tokenizer.encode("Hello world").ids == [15496, 995]  # GPT-2's published ids
    assert tokenizer.encode("<|endoftext|>").ids == [50256]


# ---------------------------------------------------------------- the user's own files


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    documents = [f"{VERSE}{number}\n" for number in range(40)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": words}) + "\n" for words in documents)
    )
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=7)
    from_lines, from_rows = (
        held(data(tmp_path / name, heldout_fraction=0.2)) for name in ("a.jsonl", "a.parquet")
    )
    assert from_lines == from_rows
    assert sorted(from_lines[0] + from_lines[1]) == sorted(documents)
    assert 1 <= len(from_lines[1]) <= 20


def test_a_single_text_file_holds_out_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(VERSE * 50)
    (train,), (heldout,) = held(data(tmp_path / "a.md", heldout_fraction=0.1))
    assert train + heldout == VERSE * 50
    assert train.endswith("\n")
    assert 0.05 < len(heldout) / len(VERSE * 50) < 0.15


def test_one_long_line_and_files_too_small_for_a_window_are_trained_on(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("Title\n" + "word " * 2000)
    (train,), (heldout,) = held(data(tmp_path / "line.txt", heldout_fraction=0.1))
    assert 0.05 < len(heldout) / len(train + heldout) < 0.15
    (tmp_path / "solid.txt").write_text("x" * 1000)
    assert [
        len(part) for part in (held(data(tmp_path / "solid.txt", heldout_fraction=0.1))[0][0])
    ] == [1] * 900


def test_splits_that_folders_name_are_kept(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        pq.write_table(pa.table({"text": [split]}), tmp_path / split / "0000.parquet")
    train, heldout = held(data(tmp_path, heldout_fraction=0.01))
    assert (train, heldout) == (["train"], ["test"])


def test_folders_globs_and_heldout_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.txt", "sub/c.txt", ".hidden.txt"):
        (tmp_path / name).write_text(VERSE)
    assert len(text.find([str(tmp_path)], "data.source")) == 3
    assert len(text.find([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")], "data.source")) == 2
    train, heldout = held(data(tmp_path / "a.txt", heldout=[str(tmp_path / "b.txt")]))
    assert (train, heldout) == ([VERSE], [VERSE])
    with pytest.raises(ValueError, match=r"a\.txt is in data.source too"):
        text.pieces(data(tmp_path / "*.txt", heldout=[str(tmp_path / "a.txt")]))


def test_a_tokenizer_that_truncates_loses_nothing_here(ray_address: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(VERSE * 20)
    source = data(tmp_path / "a.txt")
    tokenizer = text.tokenizer_for(source, text.pieces(source))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    uri = text.prepare(
        data(tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json")),
        str(tmp_path / "store"),
    )
    assert storage.read_json(f"{uri}/dataset.json")["splits"]["train"]["tokens"] > 100


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", r"empty\.txt is empty"),
        (
            "picture.png",
            b"\x89PNG",
            r"picture\.png is not one of the files expected here \(\.txt, \.md",
        ),
        ("latin.txt", "caf\xe9".encode("latin1"), r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', r"broken\.jsonl: line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', r"other\.jsonl: line 1 has no text under 'text'"),
        ("half.parquet", b"PAR1half", r"half\.parquet is not a readable parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        held(data(tmp_path / name))


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is there at .*/missing"):
        text.pieces(data(tmp_path / "missing"))
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(
        ValueError,
        match=r"other\.parquet has no column 'text': data.text_column must be one of \['body'\]",
    ):
        text.pieces(data(tmp_path / "other.parquet"))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"numbers\.parquet: row 0 of row group 0 has no text"):
        held(data(tmp_path / "numbers.parquet"))
    with pytest.raises(ValueError, match=r"data.tokenizer 'nowhere'"):
        text.tokenizer_for(data(tmp_path, tokenizer="nowhere"), [])


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [VERSE] * 500}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file \(truncated"):
        text.pieces(data(tmp_path / "a.parquet"))


# ---------------------------------------------------------------- packing and reading


@pytest.fixture(scope="module")
def packed(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextData, str, str]:
    """A small corpus of two files, its storage and its packed data set."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("".join(f"{number}: {VERSE}" for number in range(100)))
    (folder / "b.txt").write_text("".join(f"{VERSE}{number}!\n" for number in range(60)))
    source, root = data(folder), str(tmp_path_factory.mktemp("store"))
    return source, root, text.prepare(source, root)


def test_packed_tokens_are_the_documents(packed: tuple[TextData, str, str]) -> None:
    source, _, uri = packed
    folder = fetch(uri)
    meta = storage.read_json(folder / "dataset.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for split, documents in zip(("train", "heldout"), held(source), strict=True):
        shards = [
            np.fromfile(folder / shard["file"], meta["dtype"])
            for shard in meta["splits"][split]["shards"]
        ]
        assert [tokenizer.decode(list(shard[1:])) for shard in shards] == documents
        assert all(shard[0] == meta["eos_token_id"] for shard in shards)
        assert meta["splits"][split]["text_bytes"] == sum(
            len(words.encode()) for words in documents
        )


def test_it_is_packed_once_under_a_fingerprint(packed: tuple[TextData, str, str]) -> None:
    source, root, uri = packed
    before = (Path(uri) / "train-00000.bin").stat().st_mtime_ns
    assert text.prepare(source, root) == uri
    assert (Path(uri) / "train-00000.bin").stat().st_mtime_ns == before
    found = text.pieces(source)
    marks = {
        text.fingerprint(source.model_copy(update=change), found)
        for change in ({}, {"vocab_size": 301}, {"heldout_fraction": 0.06})
    }
    assert len(marks) == 3
    file = Path(source.source[0]) / "a.txt"
    original = file.read_text()
    file.write_text(original.replace("99:", "98:"))
    assert text.fingerprint(source, found) not in marks
    file.write_text(original)


def test_a_bad_file_stops_the_packing_with_its_sentence(
    packed: tuple[TextData, str, str], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 30 + "bad\n")
    given = data(tmp_path / "a.jsonl", tokenizer="gpt2")
    with pytest.raises(ValueError, match=r"^.*a\.jsonl: line 31 is not JSON"):
        text.prepare(given, str(tmp_path / "store"))


def test_every_heldout_token_is_judged_once_at_any_number_of_workers(
    packed: tuple[TextData, str, str],
) -> None:
    tokens = text.Tokens(fetch(packed[2]), "heldout", context=16)
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


@pytest.mark.parametrize("context", [16, 2000])  # within a shard, and over the border of the two
def test_windows_are_consecutive_tokens_and_shift_with_the_epoch(
    packed: tuple[TextData, str, str], context: int
) -> None:
    tokens = text.Tokens(fetch(packed[2]), "train", context)
    order = Order(len(tokens), seed=1)
    stream = np.concatenate(tokens.shards).astype(np.int64)

    def starts(epoch: int) -> set[int]:
        windows = tokens.batch(order, np.arange(epoch * len(tokens), (epoch + 1) * len(tokens)))
        assert windows.shape == (len(tokens), context + 1)
        return {
            next(
                at
                for at in range(len(stream) - context)
                if np.array_equal(stream[at : at + context + 1], window)
            )
            for window in windows
        }

    assert starts(0) != starts(1)


def test_a_missing_shard_is_named(packed: tuple[TextData, str, str], tmp_path: Path) -> None:
    storage.download(packed[2], tmp_path)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin is missing or truncated"):
        text.Tokens(tmp_path, "train", context=16)
