"""Which bundles of a registry are served, and which are refused."""

import asyncio
import shutil
from pathlib import Path

import pytest

from cluster import storage
from serve import selection
from serve.replicas import ImageReplica, TextReplica


def references(root: str) -> dict[str, str]:
    """Return what is selected by default."""
    return {modality: bundle.reference for modality, bundle in selection.select(root).items()}


def test_default_is_production_or_else_newest(registry_root: str, tmp_path: Path) -> None:
    assert references(registry_root) == {"text": "gpt/1", "image": "dcgan/1"}
    assert selection.select(registry_root, text="gpt/2")["text"].version == 2
    without_aliases = shutil.ignore_patterns("aliases")
    shutil.copytree(Path(registry_root) / "gpt", tmp_path / "gpt", ignore=without_aliases)
    assert references(str(tmp_path)) == {"text": "gpt/2"}


def test_unresolvable_name_is_skipped(
    registry_root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(registry_root, tmp_path / "models"))
    shutil.copytree(copy / "gpt/2", copy / "other/1")
    storage.write_json(str(copy / "other/aliases/production.json"), {"version": 7})
    assert references(str(copy)) == {"text": "gpt/1", "image": "dcgan/1"}
    assert "other is skipped: model 'other' has no version 7" in caplog.text
    caplog.clear()
    assert selection.select(str(copy), text="gpt/2", image="dcgan")["text"].reference == "gpt/2"
    assert caplog.text == ""


def test_bundle_that_cannot_be_served_is_refused(registry_root: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model to serve: train one and export it"):
        selection.select(str(tmp_path / "nothing"))
    with pytest.raises(
        ValueError, match="--text dcgan is a bundle of kind gan: give it one of kind gpt"
    ):
        selection.select(registry_root, text="dcgan")
    with pytest.raises(ValueError, match="gpt"):
        selection.select(registry_root, text="gpt/9")
    shutil.copytree(registry_root, tmp_path / "models")
    graph = tmp_path / "models/gpt/1/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"gpt/1/model\.onnx .*damaged"):
        selection.select(str(tmp_path / "models"))
    # A replica verifies its bundle itself.
    damaged = TextReplica(slots=1, threads=1, timeout_s=1)
    with pytest.raises(ValueError, match=r"model\.onnx .*damaged"):
        asyncio.run(damaged.reconfigure({"uri": str(tmp_path / "models/gpt/1")}))
    for replica, uri in (
        (TextReplica(slots=1, threads=1, timeout_s=1, providers=["cuda"]), "gpt/2"),
        (ImageReplica(1, ["cuda"]), "dcgan/1"),
    ):
        with pytest.raises(ValueError, match="execution provider 'cuda' is not in this build"):
            asyncio.run(replica.reconfigure({"uri": f"{registry_root}/{uri}"}))
