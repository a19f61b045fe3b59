"""A checkpoint is complete or it does not exist; what is damaged is skipped aloud."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from models import storage
from train import checkpoint
from train.checkpoint import Checkpointer


def state(value: float) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((3, 2), value)},
        "optimizer": {"state": {0: {"step": torch.tensor(value)}}, "param_groups": [{"lr": value, "params": [0]}]},
    }


def saved(folder: Path, *steps: int, keep_last: int = 5) -> Checkpointer:
    checkpoints = Checkpointer(str(folder), {"steps": 9}, keep_last=keep_last)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.join()
    return checkpoints


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    step, found = saved(tmp_path, 1, 2).load() or pytest.fail("nothing was loaded")
    assert step == 2
    assert torch.equal(found["model"]["w"], torch.full((3, 2), 2.0))
    assert found["optimizer"]["param_groups"][0]["lr"] == 2
    manifest = checkpoint.newest(str(tmp_path))
    assert manifest is not None
    assert (manifest.world_size, manifest.strategy, manifest.config) == (1, "ddp", {"steps": 9})


def test_training_may_change_the_tensors_while_they_are_written(tmp_path: Path) -> None:
    checkpoints, live = Checkpointer(str(tmp_path), {}), state(1)
    checkpoints.save(1, live)
    live["model"]["w"].zero_()
    live["optimizer"]["state"][0]["step"].zero_()
    checkpoints.join()
    _, found = checkpoints.load() or pytest.fail("nothing was loaded")
    assert found["model"]["w"].eq(1).all()
    assert found["optimizer"]["state"][0]["step"] == 1


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert storage.names(tmp_path / "checkpoints") == ["step_000003", "step_000004"]


def damage_missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flipped_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_missing_file(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def damage_half_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:40])


@pytest.mark.parametrize(
    "damage", [damage_missing_manifest, damage_truncated, damage_flipped_byte, damage_missing_file, damage_half_manifest]
)
def test_a_damaged_checkpoint_is_skipped_aloud_for_the_next_older(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step_000002")
    with caplog.at_level(logging.WARNING):
        step, found = checkpoints.load() or pytest.fail("nothing was loaded")
    assert step == 1
    assert found["model"]["w"].eq(1).all()
    assert "step_000002 is skipped" in caplog.text


def test_with_every_checkpoint_damaged_nothing_starts_over(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    damage_flipped_byte(tmp_path / "checkpoints" / "step_000001")
    with pytest.raises(ValueError, match=r"every checkpoint .* is damaged"):
        checkpoints.load()


def test_an_unwritable_store_is_one_sentence_and_older_checkpoints_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "upload", full)
    checkpoints.save(2, state(2))
    with pytest.raises(ValueError, match=r"could not be written .*No space left on device.* older ones are untouched"):
        checkpoints.join()
    step, _ = checkpoints.load() or pytest.fail("nothing was loaded")
    assert step == 1


def test_a_driver_that_was_overtaken_writes_nothing(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "driver.json", {"token": "new"})
    late = Checkpointer(str(tmp_path), {}, driver="old")
    late.save(1, state(1))
    with pytest.raises(ValueError, match=r"another driver has taken over"):
        late.join()
    assert checkpoint.newest(str(tmp_path)) is None
