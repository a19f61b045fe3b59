"""The files of a run: metrics.jsonl, starts.jsonl, alarms.jsonl."""

import math
from pathlib import Path

import pytest

from cluster import storage
from train.run import records
from train.run.recorder import NullRecorder, RunRecorder


def test_rows_are_read_bit_for_bit_and_a_resume_drops_later_ones(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, math.pi, 1 / 3]
    recorder = RunRecorder(str(tmp_path))
    for step, value in enumerate(values, 1):
        recorder.metrics(step, {"loss": value})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the process was killed while writing
    RunRecorder(str(tmp_path), start=3).close()
    assert [(row["step"], row["loss"]) for row in records.metrics(str(tmp_path))] == list(
        enumerate(values[:3], 1)
    )
    assert [start["step"] for start in records.starts(str(tmp_path))] == [0, 3]
    RunRecorder(str(tmp_path), start=3).close()
    assert [start["step"] for start in records.starts(str(tmp_path))] == [0, 3, 3]


def test_alarms_are_recorded_and_logged_and_a_resume_drops_later_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = RunRecorder(str(tmp_path))
    assert records.alarms(str(tmp_path)) == [], "the file is there, and empty"
    recorder.alarm(2, "collapse", "heldout_recall fell")
    recorder.alarm(4, "critic dominates", "it is always right")
    recorder.close()
    warnings = [one.getMessage() for one in caplog.records if one.name.startswith("train")]
    assert warnings == [
        "collapse at step 2: heldout_recall fell",
        "critic dominates at step 4: it is always right",
    ]
    RunRecorder(str(tmp_path), start=3).close()
    assert records.alarms(str(tmp_path)) == [
        {"step": 2, "kind": "collapse", "message": "heldout_recall fell"}
    ]
    storage.delete(str(tmp_path / "alarms.jsonl"))
    assert records.alarms(str(tmp_path)) is None, "a run of an older version has no file"
    NullRecorder().alarm(1, "collapse", "not recorded")


def test_remote_run_keeps_its_alarms_when_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "local_path", lambda uri: None)
    for start, step in [(0, 1), (1, 2)]:
        recorder = RunRecorder(str(tmp_path), start)
        recorder.alarm(step, "divergence", f"of step {step}")
        recorder.close()
    assert [alarm["message"] for alarm in records.alarms(str(tmp_path)) or []] == [
        "of step 1",
        "of step 2",
    ]
