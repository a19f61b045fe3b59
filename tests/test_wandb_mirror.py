"""A run's copy in Weights & Biases."""

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import storage
from train.run import records
from train.run import wandb_mirror as mirror
from train.run.recorder import RunRecorder
from train.run.wandb_mirror import Options

WANDB: Options = {
    "mode": "offline",
    "project": "kiln",
    "name": "watched",
    "config": {"optim": {"lr": 0.1}},
}


def history(run: Path) -> dict[int, dict[str, Any]]:
    """Return {step: {metric: value}} from the run's one offline folder: W&B's messages in LevelDB's
    log format."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # set at import

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    data, rows, parts, at = file.read_bytes(), {}, b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # the end of a block, too short for a header
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                step = record.history.step.num
                assert step not in rows, f"step {step} occurs twice"
                rows[step] = {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
    return rows


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The warnings that a driver would show."""
    shown: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    handler = Collector(logging.WARNING)
    logging.getLogger("train").addHandler(handler)
    yield shown
    logging.getLogger("train").removeHandler(handler)


def services() -> list[str]:
    """Return the names of W&B's processes among this process's children."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    return [name for pid in pids if "wandb" in (name := Path(f"/proc/{pid}/comm").read_text())]


def record(run: Path, start: int, stop: int) -> None:
    """Record steps `start` + 1 to `stop` of a run."""
    recorder = RunRecorder(str(run), start, wandb=WANDB)
    for step in range(start + 1, stop + 1):
        recorder.metrics(step, {"loss": 1 / step, "lr": 0.1})
        if step % 2 == 0:
            recorder.metrics(step, {"heldout_loss": 2 / step})
            recorder.text(step, "text", f"<b> of step {step}\nand more")
            recorder.image(step, "grid", np.full((4, 6, 1), step, dtype=np.uint8))
    recorder.close()


def record_in_thread(run: Path, start: int, stop: int) -> None:
    """Record in a thread, as a Ray Train worker does."""
    thread = threading.Thread(target=record, args=(run, start, stop))
    thread.start()
    thread.join(120)
    assert not thread.is_alive()


def test_offline_file_has_all_records_and_each_step_once_after_a_resume(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    warned: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With openai imported, W&B would advertise Weave.
    monkeypatch.setitem(sys.modules, "openai", sys)
    record_in_thread(tmp_path, 0, 5)
    rows = history(tmp_path)
    assert sorted(rows) == [1, 2, 3, 4, 5]
    assert [rows[step]["loss"] for step in sorted(rows)] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert rows[4]["heldout_loss"] == 0.5
    times = {row["step"]: row["time"] for row in records.metrics(str(tmp_path))}
    assert rows[3]["_timestamp"] == times[3]
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert "&lt;b&gt; of step 4\nand more" in (folder / "files" / rows[4]["text.path"]).read_text()
    assert (rows[4]["grid.width"], rows[4]["grid.height"]) == (6, 4)

    record_in_thread(tmp_path, 3, 7)  # killed after step 5; the checkpoint is of step 3
    again = history(tmp_path)
    assert sorted(again) == [1, 2, 3, 4, 5, 6, 7]
    assert [again[step]["loss"] for step in sorted(again)] == [1 / step for step in range(1, 8)]
    assert [again[step]["_timestamp"] for step in (1, 2, 3)] == [times[step] for step in (1, 2, 3)]
    for name in ("heldout_loss", "text.sha256", "grid.sha256"):
        assert again[2][name] == rows[2][name]
    (later,) = tmp_path.glob("wandb/offline-run-*")
    assert later.name.split("-", 3)[3] == folder.name.split("-", 3)[3], "W&B has one run, not two"
    assert services() == []
    assert warned == []
    assert capfd.readouterr() == ("", "")


def test_offline_resume_restores_what_a_killed_process_had_not_written(
    tmp_path: Path,
) -> None:
    code = f"""
import os, signal
from train.run.recorder import RunRecorder
recorder = RunRecorder({str(tmp_path)!r}, wandb={WANDB!r})
for step in range(1, 6):
    recorder.metrics(step, {{"loss": 1 / step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=120, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    record_in_thread(tmp_path, 4, 6)
    assert {step: row["loss"] for step, row in history(tmp_path).items()} == {
        step: 1 / step for step in range(1, 7)
    }


def test_remote_run_has_a_copy(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "local_path", lambda uri: None)
    for start, stop in [(0, 3), (2, 4)]:
        record(tmp_path, start, stop)
        assert {step: row["loss"] for step, row in history(tmp_path).items()} == {
            step: 1 / step for step in range(1, stop + 1)
        }
    assert "text.path" in history(tmp_path)[2]
    assert [start["step"] for start in records.starts(str(tmp_path))] == [0, 2]
    assert warned == []


def test_runs_of_one_name_on_two_storages_are_two_runs(tmp_path: Path) -> None:
    names = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        record(folder, 0, 1)
        names |= {file.stem for file in folder.glob("wandb/offline-run-*/*.wandb")}
    assert len(names) == 2


def test_training_continues_with_one_warning_when_wandb_dies(
    tmp_path: Path, warned: list[str]
) -> None:
    recorder = RunRecorder(str(tmp_path), wandb=WANDB)
    recorder.metrics(1, {"loss": 1.0})
    for file in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in file.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core"):
                os.kill(int(pid), signal.SIGKILL)
                os.waitpid(int(pid), 0)
    for step in range(2, 200):
        recorder.metrics(step, {"loss": 1 / step})
    recorder.text(200, "text", "something")
    recorder.close()
    assert len(records.metrics(str(tmp_path))) == 199
    assert len(warned) == 1
    assert warned[0].startswith("Weights & Biases gets nothing more of this run: ")


def test_worker_without_wandb_trains_with_a_warning(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    record(tmp_path, 0, 2)
    assert len(records.metrics(str(tmp_path))) == 3
    assert len(warned) == 1


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_missing_wandb_is_an_error_that_says_what_to_install(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror.check_wandb("off")
    expected = (
        f"^log.wandb is {mode} and wandb is not installed: pip install wandb, or use "
        "--log.wandb off$"
    )
    with pytest.raises(ValueError, match=expected):
        mirror.check_wandb(mode)


def test_online_needs_a_valid_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    mirror.check_wandb("offline")
    with pytest.raises(ValueError, match="there is no key: set WANDB_API_KEY"):
        mirror.check_wandb("online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    expected = r"the login to W&B failed \(WANDB_API_KEY invalid: .*\): check WANDB_API_KEY"
    with pytest.raises(ValueError, match=expected):
        mirror.check_wandb("online")
    assert services() == []
