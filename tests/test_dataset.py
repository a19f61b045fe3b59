"""A prepared data set: written, found, opened and fetched."""

import tempfile
from pathlib import Path

import pytest

from cluster import storage
from train.data.dataset import Dataset, ExtractorEntry

META = {"name": "plays", "fingerprint": "0123456789ab", "classes": []}


def test_data_set_is_found_and_opened_once_it_is_written(tmp_path: Path) -> None:
    uri = f"{tmp_path}/plays-0123456789ab"
    assert Dataset.find(uri) is None
    with pytest.raises(FileNotFoundError):
        Dataset.open(uri)
    (tmp_path / "plays-0123456789ab").mkdir()
    assert Dataset.find(uri) is None, "a folder without dataset.json holds no data set"
    written = Dataset.write(uri, META)
    assert written == Dataset(uri, META)
    assert Dataset.open(uri) == Dataset.find(uri) == written
    assert (written.name, written.fingerprint) == ("plays", "0123456789ab")


def test_with_extractor_leaves_the_data_set_unchanged(tmp_path: Path) -> None:
    dataset = Dataset.write(f"{tmp_path}/x", META)
    extractor: ExtractorEntry = {
        "uri": "extractor.safetensors",
        "sha256": "00",
        "task": "classes",
        "accuracy": 0.9,
        "heldout": 10,
        "train": 20,
        "classes": ["a", "b"],
        "dataset": "0123456789ab",
    }
    extended = dataset.with_extractor(extractor)
    assert dataset.extractor is None
    assert extended.extractor == extractor
    assert (extended.uri, extended.meta) == (dataset.uri, dataset.meta)


def test_fetch_returns_the_folder_of_a_mounted_storage(tmp_path: Path) -> None:
    assert Dataset.write(f"{tmp_path}/x", META).fetch() == tmp_path / "x"


def test_fetch_downloads_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.write(f"file://{tmp_path}/store/x", META)
    storage.write_bytes(f"{tmp_path}/store/x/train.npy", b"pixels")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(storage, "local_path", lambda uri: None)  # as on an object store
    copy = dataset.fetch()
    assert copy == scratch / "raykiln-data" / "x"
    assert (copy / "train.npy").read_bytes() == b"pixels"
    assert storage.read_json(copy / "dataset.json") == META
    storage.delete(f"{tmp_path}/store/x")
    assert dataset.fetch() == copy
    assert {path.name for path in copy.parent.iterdir()} == {"x", "x.lock"}
