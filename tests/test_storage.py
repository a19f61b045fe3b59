"""Storage: the same on a folder and on an object store (an S3 server on this machine)."""

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster import storage
from train.run.checkpoint import Checkpointer

VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path)
        if request.param == "folder"
        else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    )


def test_files_are_written_read_listed_and_deleted(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "a", "b.json")
    assert not storage.exists(uri)
    assert storage.names(storage.join(root, "nowhere")) == []
    storage.write_json(uri, {"x": "é"})
    storage.write_json(uri, {"x": "ö"})
    assert storage.read_json(uri) == {"x": "ö"}
    assert storage.names(storage.join(root, "a")) == ["b.json"]
    assert list(storage.files(root)) == ["a/b.json"]
    assert storage.is_file(uri)
    assert not storage.is_file(storage.join(root, "a"))
    storage.download(storage.join(root, "a"), tmp_path / "down")
    storage.upload(tmp_path / "down", storage.join(root, "up"))
    assert storage.read_json(storage.join(root, "up", "b.json")) == {"x": "ö"}
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_compressed_file_is_written_read_and_hashed_as_it_is(root: str, tmp_path: Path) -> None:
    uri, packed = storage.join(root, "corpus.txt.gz"), gzip.compress(b"to be" * 1000)
    storage.write_bytes(uri, packed)
    (tmp_path / "local.gz").write_bytes(packed)
    storage.upload_file(tmp_path / "local.gz", f"{uri}.copy.gz")
    for written in (uri, f"{uri}.copy.gz"):
        assert storage.read_bytes(written) == packed
        assert storage.sha256(written) == hashlib.sha256(packed).hexdigest()


def test_upload_changed_copies_only_new_and_changed_files(root: str, tmp_path: Path) -> None:
    folder, there = tmp_path / "run", storage.join(root, "there")
    before: dict[str, tuple[int, int]] = {}
    for name in ("curves.jsonl", "samples/1.png", "samples/2.png"):
        storage.write_bytes(folder / name, name.encode())
    storage.upload_changed(folder, there, before)
    assert storage.files(there) == {
        name: len(name) for name in ("curves.jsonl", "samples/1.png", "samples/2.png")
    }
    storage.delete(storage.join(there, "samples", "1.png"))  # to see whether it is written again
    (folder / "curves.jsonl").write_text("a line more")
    storage.write_bytes(folder / "samples" / "3.png", b"")
    storage.upload_changed(folder, there, before)
    assert set(storage.files(there)) == {"curves.jsonl", "samples/2.png", "samples/3.png"}
    assert storage.read_bytes(storage.join(there, "curves.jsonl")) == b"a line more"


def test_checkpoints_are_saved_and_loaded(root: str) -> None:
    checkpoints = Checkpointer(root, {}, keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(
            step,
            {
                "model": {"w": torch.full((2,), float(step))},
                "optimizer": {"state": {}, "param_groups": []},
            },
        )
    checkpoints.join()
    assert storage.names(storage.join(root, "checkpoints")) == ["step_000002", "step_000003"]
    step, state = checkpoints.load() or pytest.fail("nothing was loaded")
    assert (step, state["model"]["w"].tolist()) == (3, [3.0, 3.0])


def test_unknown_scheme_and_damaged_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"storage 'nowhere://x' cannot be opened"):
        storage.exists("nowhere://x")
    (tmp_path / "a.json").write_text('{"half": ')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        storage.read_json(tmp_path / "a.json")


def test_storage_that_cannot_be_opened_is_an_os_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(uri: str) -> None:
        raise OSError(f"no route to {uri}")

    monkeypatch.setattr("cluster.storage.fs.FileSystem", SimpleNamespace(from_uri=unreachable))
    message = r"storage 's3://bucket/x' cannot be opened: no route to s3://bucket/x\. Use a folder"
    with pytest.raises(OSError, match=message):
        storage.read_json("s3://KEY:SECRET@bucket/x")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://KEY:SE%2FCRET@bucket/kiln", "s3://bucket/kiln"),
        ("s3://KEY:SECRET@bucket/kiln?region=x", "s3://bucket/kiln?region=x"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("/home/me@work/kiln", "/home/me@work/kiln"),
    ],
)
def test_secrets_are_removed_from_a_uri(uri: str, shown: str) -> None:
    assert storage.without_secrets(uri) == shown


@pytest.mark.slow
def test_training_resumes_and_exports_on_an_object_store(
    bucket: str, tmp_path: Path, command: Callable[..., Any]
) -> None:
    (tmp_path / "corpus.txt").write_text("".join(f"{number}: {VERSE}" for number in range(120)))
    store = f"{bucket}/store"
    # On a private cluster, whose workers inherit the address and the keys of the bucket.
    train = [
        "train",
        "gpt",
        "--config",
        "gpt-tiny",
        "--run.name",
        "r",
        "--data.source",
        f"{tmp_path}/corpus.txt",
        "--storage",
        store,
    ]
    for steps, line in (("20", "run r starts"), ("30", "run r resumes from step 20")):
        done = command(*train, "--steps", steps, RAY_ADDRESS="")
        assert done.returncode == 0, done.stderr
        assert line in done.stdout
    assert command("train", "export", "r", "--storage", store, RAY_ADDRESS="").returncode == 0
    verified = command("models", "verify", "gpt", "--storage", store)
    assert "all as published" in verified.stdout
    assert {
        "runs/r/metrics.jsonl",
        "runs/r/report.md",
        "models/gpt/1/manifest.json",
    } <= storage.files(store).keys()
