"""A bundle's manifest: it lists every file, and damage is named."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models import bundle
from tests.support.manifests import MANIFEST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / "transformers").mkdir(parents=True)
    (tmp_path / "b" / "model.onnx").write_bytes(b"graph" * 1000)
    (tmp_path / "b" / "transformers" / "config.json").write_text("{}")
    bundle.write(tmp_path / "b", MANIFEST)
    return tmp_path / "b"


def test_manifest_lists_every_file(folder: Path) -> None:
    manifest = bundle.verify(folder)
    assert manifest["files"] == {
        "model.onnx": {
            "bytes": 5000,
            "sha256": "8c0cdcc073c4e57115e9968a329b0e8a2b7a2a29852ac0dbe8e4dc445ab3ed92",
        },
        "transformers/config.json": {
            "bytes": 2,
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        },
    }
    assert manifest["commit"] is None
    assert bundle.size(manifest) == 5002


def test_manifest_does_not_list_itself(folder: Path) -> None:
    bundle.write(folder, MANIFEST)
    assert list(bundle.verify(folder)["files"]) == ["model.onnx", "transformers/config.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "model.onnx").write_bytes(b"Graph" * 1000),
            r"model\.onnx does not have the sha256 that its manifest lists",
        ),
        (
            lambda folder: (folder / "model.onnx").write_bytes(b"graph"),
            r"model\.onnx has 5 bytes, its manifest lists 5000",
        ),
        (
            lambda folder: shutil.rmtree(folder / "transformers"),
            r"transformers/config\.json is missing",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "never finished"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"kind": "gp'),
            "manifest.json is damaged",
        ),
        (
            lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
            "manifest.json is damaged",
        ),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "contains no JSON object"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"kind": "gpt"}'),
            "lacks created, files",
        ),
        (lambda folder: _edit(folder, kind="vae"), "kind 'vae'"),
        (lambda folder: _edit(folder, files={"model.onnx": 5}), "no list of files"),
        (
            lambda folder: _edit(folder, model={"context": 257}),
            r"manifest\.json does not match its own sha256",
        ),
        (
            lambda folder: _edit(folder, sha256="0" * 64),
            r"manifest\.json does not match its own sha256",
        ),
    ],
)
def test_damage_is_named(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        bundle.verify(folder)


def _edit(folder: Path, **entries: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | entries))


def test_every_flipped_bit_of_a_manifest_is_detected(folder: Path) -> None:
    file, manifest = folder / "manifest.json", bundle.read(folder)
    content = file.read_bytes()
    for number, byte in enumerate(content):
        flipped = bytes([byte ^ 1 << number % 7])
        file.write_bytes(content[:number] + flipped + content[number + 1 :])
        with contextlib.suppress(ValueError):
            # Only a change of white space may go undetected.
            assert bundle.read(folder) == manifest, f"byte {number} is {bytes([byte])!r}"


def test_incomplete_manifest_is_not_written(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="lacks parity"):
        bundle.write(folder, {key: value for key, value in MANIFEST.items() if key != "parity"})
    assert not (folder / "manifest.json").exists()


def test_empty_folder_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no file"):
        bundle.write(tmp_path, MANIFEST)
