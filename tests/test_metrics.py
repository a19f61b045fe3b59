"""What people watch: the meter, the recorder, its copy in Weights & Biases."""

import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster import storage
from models.nets import gpt
from train.run import flops
from train.run import wandb_mirror as mirror
from train.run.recorder import Meter

WANDB = {"mode": "offline", "project": "kiln", "name": "watched", "config": {"optim": {"lr": 0.1}}}


# ---------------------------------------------------------------- the meter


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_speed_is_over_training_alone_and_waiting_is_part_of_it(clock: Clock) -> None:
    meter = Meter("tokens_per_s", per_step=100)
    for _ in range(4):
        with meter.waiting("data"):
            clock.passes(0.5)
        clock.passes(1.5)
        meter.count()
    with meter.paused():
        clock.passes(1000)
    assert meter.read() == {"tokens_per_s": 50.0, "data_s": 2.0}  # 400 tokens in 8 s


def test_each_reading_is_since_the_last_and_the_total_is_over_all(clock: Clock) -> None:
    meter = Meter("tokens_per_s", per_step=100, flop_per_step=30.0, peak_flops=60.0)
    for seconds, data in [(1.0, 0.25), (3.0, 0.5)]:
        clock.passes(seconds - data)
        with meter.waiting("data"):
            clock.passes(data)
        meter.count()
        assert meter.read() == {"tokens_per_s": 100 / seconds, "mfu": 0.5 / seconds, "data_s": data}
    clock.passes(1.0)
    assert meter.read() == {"tokens_per_s": 0.0, "mfu": 0.0}, "nothing was waited for since"
    assert meter.total() == {"tokens_per_s": 40.0, "mfu": 0.2, "train_s": 5.0, "data_s": 0.75}


def test_a_pause_does_not_hide_what_was_waited_for_in_it(clock: Clock) -> None:
    meter = Meter("tokens_per_s", per_step=100)
    clock.passes(1.0)
    meter.count()
    assert meter.read() == {"tokens_per_s": 100.0}
    for _ in range(2):
        with meter.paused():
            clock.passes(5.0)
            with meter.waiting("checkpoint"):
                clock.passes(2.0)
    assert meter.total() == {"tokens_per_s": 100.0, "train_s": 1.0, "checkpoint_s": 4.0}, (
        "waited for since the last reading"
    )
    clock.passes(1.0)
    meter.count()
    assert meter.read() == {"tokens_per_s": 100.0, "checkpoint_s": 4.0}
    assert meter.total() == {"tokens_per_s": 100.0, "train_s": 2.0, "checkpoint_s": 4.0}


@pytest.mark.parametrize("known", [{"flop_per_step": 1e9}, {"peak_flops": 1e9}, {}])
def test_without_both_halves_there_is_no_mfu(known: dict[str, float], clock: Clock) -> None:
    meter = Meter("tokens_per_s", 1, **known)
    clock.passes(1.0)
    meter.count()
    assert "mfu" not in meter.read() | meter.total()


# ---------------------------------------------------------------- FLOP


def test_the_flop_formula_by_hand() -> None:
    # 6 x 1,000 = 6,000, and 12 x 2 layers x 8 wide x 16 tokens = 3,072
    assert flops.gpt_flops(parameters=1000, layers=2, width=8, context=16) == 9072


def test_the_flop_formula_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = gpt.build(vocab_size=96, context=32, width=48, layers=3, heads=4)
    model.set_attn_implementation(
        "eager"
    )  # as matrix products, which is what the counter knows on a CPU
    ids = torch.randint(0, 96, (2, 33))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    matrices = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1) - 32 * 48
    )  # positions are added
    assert flops.gpt_flops(matrices, 3, 48, 32) * 64 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312),
        ("NVIDIA A100 80GB PCIe", "fp32", True, 156),
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 PCIe", "fp16", False, 756),
        ("NVIDIA H200", "fp32", False, 66.9),
        ("NVIDIA L4", "bf16", False, 121),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA A10G", "bf16", False, 70),
        ("Tesla T4", "fp16", False, 65),
        ("Tesla T4", "fp32", True, 8.1),  # it has no TF32
        ("Tesla T4", "bf16", False, 0),  # nor units for bf16
        ("Tesla V100-SXM2-16GB", "fp16", False, 125),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, 0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, 0),
        ("NVIDIA GH200 480GB", "bf16", False, 0),
        ("NVIDIA L40", "bf16", False, 0),
    ],
)
def test_a_gpu_is_looked_up_by_its_whole_name(
    name: str, precision: str, tf32: bool, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(
        torch, "get_float32_matmul_precision", lambda: "high" if tf32 else "highest"
    )
    assert flops.peak_flops(torch.device("cuda"), precision) == pytest.approx(tflops * 1e12)


def test_a_cpu_is_measured_and_the_noise_of_training_stays() -> None:
    state = torch.get_rng_state()
    assert 1e8 < flops.peak_flops(torch.device("cpu"), "fp32") < 1e14
    assert torch.equal(torch.get_rng_state(), state)
    assert flops.peak_flops(torch.device("meta"), "fp32") == 0


# ---------------------------------------------------------------- the recorder


def test_rows_come_back_bit_for_bit_and_a_resume_drops_what_came_after_it(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, math.pi, 1 / 3]
    recorder = RunRecorder(str(tmp_path))
    for step, value in enumerate(values, 1):
        recorder.metrics(step, {"loss": value})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    RunRecorder(str(tmp_path), start=3).close()
    assert [(row["step"], row["loss"]) for row in records.metrics(str(tmp_path))] == list(
        enumerate(values[:3], 1)
    )
    assert [start["step"] for start in records.starts(str(tmp_path))] == [0, 3]
    RunRecorder(str(tmp_path), start=3).close()
    assert [start["step"] for start in records.starts(str(tmp_path))] == [0, 3, 3]


def test_an_alarm_is_recorded_and_said_and_a_resume_drops_those_beyond_it(
    tmp_path: Path, warned: list[str]
) -> None:
    recorder = RunRecorder(str(tmp_path))
    assert records.alarms(str(tmp_path)) == [], "somebody looks, and there is nothing"
    recorder.alarm(2, "collapse", "heldout_recall fell")
    recorder.alarm(4, "critic dominates", "it is always right")
    recorder.close()
    assert warned == [
        "collapse at step 2: heldout_recall fell",
        "critic dominates at step 4: it is always right",
    ]
    RunRecorder(str(tmp_path), start=3).close()
    assert records.alarms(str(tmp_path)) == [
        {"step": 2, "kind": "collapse", "sentence": "heldout_recall fell"}
    ]
    storage.delete(str(tmp_path / "alarms.jsonl"))
    assert records.alarms(str(tmp_path)) is None, "a run of an older version: nobody looked"
    NullRecorder().alarm(1, "collapse", "nobody hears it")


def test_a_remote_run_keeps_its_alarms_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "local_path", lambda uri: None)
    for start, step in [(0, 1), (1, 2)]:
        recorder = RunRecorder(str(tmp_path), start)
        recorder.alarm(step, "divergence", f"of step {step}")
        recorder.close()
    assert [alarm["sentence"] for alarm in records.alarms(str(tmp_path)) or []] == [
        "of step 1",
        "of step 2",
    ]


# ---------------------------------------------------------------- Weights & Biases


def history(run: Path) -> dict[int, dict[str, Any]]:
    """{step: {tag: value}} of the one offline folder that a run has: W&B's own messages in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import from a descriptor

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    data, rows, parts, at = file.read_bytes(), {}, b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a block's tail, too short for a header
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                step = record.history.step.num
                assert step not in rows, f"step {step} is there twice"
                rows[step] = {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
    return rows


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What a driver would be shown."""
    shown: list[str] = []

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    handler = Shown(logging.WARNING)
    logging.getLogger("train").addHandler(handler)
    yield shown
    logging.getLogger("train").removeHandler(handler)


def services() -> list[str]:
    """The commands that are this process's children and W&B's."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    return [name for pid in pids if "wandb" in (name := Path(f"/proc/{pid}/comm").read_text())]


def record(run: Path, start: int, stop: int) -> None:
    """A run's part as in a Ray Train worker: in a thread."""
    recorder = RunRecorder(str(run), start, wandb=WANDB)
    for step in range(start + 1, stop + 1):
        recorder.metrics(step, {"loss": 1 / step, "lr": 0.1})
        if step % 2 == 0:
            recorder.metrics(step, {"heldout_loss": 2 / step})
            recorder.text(step, "text", f"<b> of step {step}\nand more")
            recorder.image(step, "grid", np.full((4, 6, 1), step, dtype=np.uint8))
    recorder.close()


def in_a_thread(*args: Any) -> None:
    thread = threading.Thread(target=record, args=args)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()


def test_offline_all_that_is_recorded_is_in_wandbs_file_and_a_resume_keeps_each_step_once(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    warned: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        sys.modules, "openai", sys
    )  # W&B would recommend Weave to whom it sees with it
    in_a_thread(tmp_path, 0, 5)
    rows = history(tmp_path)
    assert sorted(rows) == [1, 2, 3, 4, 5]
    assert [rows[step]["loss"] for step in sorted(rows)] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert rows[4]["heldout_loss"] == 0.5
    times = {row["step"]: row["time"] for row in records.metrics(str(tmp_path))}
    assert rows[3]["_timestamp"] == times[3]
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert "&lt;b&gt; of step 4\nand more" in (folder / "files" / rows[4]["text.path"]).read_text()
    assert (rows[4]["grid.width"], rows[4]["grid.height"]) == (6, 4)

    in_a_thread(tmp_path, 3, 7)  # it was killed after step 5, and its checkpoint is of step 3
    again = history(tmp_path)
    assert sorted(again) == [1, 2, 3, 4, 5, 6, 7]
    assert [again[step]["loss"] for step in sorted(again)] == [1 / step for step in range(1, 8)]
    assert [again[step]["_timestamp"] for step in (1, 2, 3)] == [times[step] for step in (1, 2, 3)]
    for tag in ("heldout_loss", "text.sha256", "grid.sha256"):
        assert again[2][tag] == rows[2][tag]
    (later,) = tmp_path.glob("wandb/offline-run-*")
    assert later.name.split("-", 3)[3] == folder.name.split("-", 3)[3], "the same run, for W&B"
    assert services() == []
    assert warned == []
    assert capfd.readouterr() == ("", "")


def test_offline_what_a_killed_process_had_not_written_is_there_after_the_resume(
    tmp_path: Path,
) -> None:
    code = f"""
import os, signal
from train.run import records
from train.metrics import RunRecorder
recorder = RunRecorder({str(tmp_path)!r}, wandb={WANDB!r})
for step in range(1, 6):
    recorder.metrics(step, {{"loss": 1 / step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=120, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    in_a_thread(tmp_path, 4, 6)
    assert {step: row["loss"] for step, row in history(tmp_path).items()} == {
        step: 1 / step for step in range(1, 7)
    }


def test_a_remote_run_has_its_copy_too(
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


def test_a_run_of_the_same_name_elsewhere_is_another_one(tmp_path: Path) -> None:
    names = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        record(folder, 0, 1)
        names |= {file.stem for file in folder.glob("wandb/offline-run-*/*.wandb")}
    assert len(names) == 2


def test_when_wandb_dies_training_goes_on_and_the_driver_is_told_once(
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


def test_a_worker_without_wandb_trains_without_it(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    record(tmp_path, 0, 2)
    assert len(records.metrics(str(tmp_path))) == 3
    assert len(warned) == 1


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_without_wandb_the_driver_says_what_to_install(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror.check_wandb("off")
    with pytest.raises(
        ValueError,
        match=f"^log.wandb is {mode} and wandb is not installed: pip install wandb, or use --log.wandb off$",
    ):
        mirror.check_wandb(mode)


def test_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    mirror.check_wandb("offline")
    with pytest.raises(ValueError, match="there is no key: set WANDB_API_KEY"):
        mirror.check_wandb("online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(
        ValueError, match=r"does not let us in \(WANDB_API_KEY invalid: .*\): check WANDB_API_KEY"
    ):
        mirror.check_wandb("online")
    assert services() == []
