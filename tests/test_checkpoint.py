"""A checkpoint is complete or absent; a damaged one is skipped with a warning."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import storage
from tests.support import workers
from train.parallel.state import Halt, Shard
from train.run import checkpoint
from train.run.checkpoint import Checkpointer


def state(value: float) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((3, 2), value)},
        "model_optimizer": {"exp_avg/w": torch.full((3, 2), value)},
        "model_progress": {"updates": int(value)},
    }


def saved(folder: Path, *steps: int, keep_last: int = 5) -> Checkpointer:
    checkpoints = Checkpointer(str(folder), {"steps": 9}, keep_last=keep_last)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.join()
    return checkpoints


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    step, found = saved(tmp_path, 1, 2).load() or pytest.fail("nothing was loaded")
    assert step == 2
    assert torch.equal(found["model"]["w"], torch.full((3, 2), 2.0))
    assert torch.equal(found["model_optimizer"]["exp_avg/w"], torch.full((3, 2), 2.0))
    assert found["model_progress"] == {"updates": 2}
    manifest = checkpoint.newest(str(tmp_path))
    assert manifest is not None
    assert (manifest.world_size, manifest.strategy, manifest.config) == (1, "ddp", {"steps": 9})


def test_save_copies_tensors_before_it_returns(tmp_path: Path) -> None:
    checkpoints, live = Checkpointer(str(tmp_path), {}), state(1)
    checkpoints.save(1, live)
    live["model"]["w"].zero_()
    live["model_optimizer"]["exp_avg/w"].zero_()
    checkpoints.join()
    _, found = checkpoints.load() or pytest.fail("nothing was loaded")
    assert found["model"]["w"].eq(1).all()
    assert found["model_optimizer"]["exp_avg/w"].eq(1).all()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert storage.names(tmp_path / "checkpoints") == ["step_000003", "step_000004"]


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 999_999, 1_000_000, keep_last=1)
    assert storage.names(tmp_path / "checkpoints") == ["step_1000000"]


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
    (folder / "model_optimizer.safetensors").unlink()


def damage_half_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:40])


def damage_old_format(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing_manifest,
        damage_truncated,
        damage_flipped_byte,
        damage_missing_file,
        damage_half_manifest,
        damage_old_format,
    ],
)
def test_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step_000002")
    with caplog.at_level(logging.WARNING):
        step, found = checkpoints.load() or pytest.fail("nothing was loaded")
    assert step == 1
    assert found["model"]["w"].eq(1).all()
    assert "step_000002 is skipped" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated,
        damage_flipped_byte,
        damage_missing_file,
        damage_half_manifest,
        damage_old_format,
    ],
)
def test_load_fails_if_every_checkpoint_is_damaged(tmp_path: Path, damage: Any) -> None:
    checkpoints = saved(tmp_path, 1)
    damage(tmp_path / "checkpoints" / "step_000001")
    with pytest.raises(
        ValueError, match=r"every checkpoint .* is damaged \(step_000001: .*\): restore one, or"
    ):
        checkpoints.load()


def test_unfinished_first_checkpoint_does_not_count(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    damage_missing_manifest(tmp_path / "checkpoints" / "step_000001")
    assert checkpoints.load() is None


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpointer(str(tmp_path), {}, keep_last=1, keep_best=2)
    for step, score in enumerate([3.0, 1.0, 2.0, None, 5.0, 1.0, None], 1):
        checkpoints.save(step, state(step), score)
    checkpoints.join()
    assert storage.names(tmp_path / "checkpoints") == ["step_000002", "step_000006", "step_000007"]
    assert [one.step for one in checkpoint.best(checkpoint.complete(str(tmp_path)))] == [6, 2]


def test_failed_write_halts_and_keeps_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "upload", full)
    checkpoints.save(2, state(2))
    with pytest.raises(
        ValueError,
        match=r"could not be written .*No space left on device.* older ones are untouched",
    ):
        checkpoints.join()
    step, _ = checkpoints.load() or pytest.fail("nothing was loaded")
    assert step == 1


def test_driver_that_was_replaced_writes_nothing(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "driver.json", {"token": "new"})
    late = Checkpointer(str(tmp_path), {}, driver="old")
    late.save(1, state(1))
    with pytest.raises(ValueError, match=r"another driver has taken over"):
        late.join()
    assert checkpoint.newest(str(tmp_path)) is None


def test_run_resumed_from_an_older_checkpoint_keeps_its_new_ones(tmp_path: Path) -> None:
    """Damaged checkpoints of later steps must not displace complete ones."""
    checkpoints = saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        damage_flipped_byte(tmp_path / "checkpoints" / f"step_{step:06d}")
    back = Checkpointer(str(tmp_path), {}, keep_last=1)
    step, _ = back.load() or pytest.fail("nothing was loaded")
    assert step == 1
    storage.delete(tmp_path / "checkpoints" / "step_000002")
    back.save(2, state(2))
    back.join()
    step, _ = checkpoints.load() or pytest.fail("nothing was loaded")
    assert step == 2


def test_read_error_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1, 2)

    def unreachable(*_: object) -> None:
        raise TimeoutError("the store does not answer")

    monkeypatch.setattr(checkpoint, "read", unreachable)
    with pytest.raises(
        OSError, match=r"checkpoint step_000002 of .* could not be read: the store does not answer"
    ):
        checkpoints.load()


def test_next_checkpoint_deletes_unfinished_ones(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage_missing_manifest(tmp_path / "checkpoints" / "step_000002")
    checkpoints.save(3, state(3))
    checkpoints.join()
    assert storage.names(tmp_path / "checkpoints") == ["step_000001", "step_000003"]


# ---- several workers


SHAPE = (3, 5)


def sharded_state(rank: int, world_size: int) -> dict[str, Any]:
    """Return a state with a whole part and one of which each worker has a shard."""
    whole = torch.arange(15.0)
    size = -(-15 // world_size)
    shard = whole[rank * size : (rank + 1) * size]
    return {
        "model": {"w": whole.view(SHAPE)},
        "model_optimizer": {"exp_avg/w": Shard(shard, rank * size, SHAPE)},
    }


def save_together(rank: int, world_size: int, root: str) -> None:
    checkpoints = Checkpointer(root, {})
    checkpoints.save(1, sharded_state(rank, world_size))
    checkpoints.join()
    if rank == 1:  # its disk is full: the checkpoint must not count on any worker
        storage.upload = full  # type: ignore[assignment]  # in a spawned worker
    checkpoints.save(2, sharded_state(rank, world_size))
    try:
        checkpoints.join()
    except Halt as halt:
        Path(root, f"halt-{rank}").write_text(str(halt))
    step, found = checkpoints.load() or (0, {})
    assert step == 1
    assert torch.equal(found["model_optimizer"]["exp_avg/w"], torch.arange(15.0).view(SHAPE))


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_shards_are_joined_and_one_full_disk_halts_all_workers(tmp_path: Path) -> None:
    workers.spawn(3, save_together, 3, str(tmp_path))
    for rank in range(3):
        assert (
            "worker 1: [Errno 28] No space left on device"
            in (tmp_path / f"halt-{rank}").read_text()
        )
    step, found = Checkpointer(str(tmp_path), {}).load() or pytest.fail("nothing was loaded")
    assert step == 1
    assert torch.equal(found["model_optimizer"]["exp_avg/w"], found["model"]["w"])
    shard = next((tmp_path / "checkpoints" / "step_000001").glob("*-00002-of-00003.safetensors"))
    shard.unlink()
    with pytest.raises(
        ValueError,
        match=r"model_optimizer-00002-of-00003.safetensors should have \d+ bytes and has none",
    ):
        checkpoint.newest(str(tmp_path))
