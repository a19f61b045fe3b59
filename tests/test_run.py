"""The folder of a run: it resumes or refuses, its config is kept, and it has one driver."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster import storage
from train.config import loader as configs
from train.config.sections import Config
from train.run.checkpoint import Checkpointer
from train.run.folder import open_run


def config(**values: Any) -> Config:
    return configs.load("gpt", "gpt-tiny", {"run.name": "r", **values})


def write_checkpoint(root: Path, made: Config, step: int = 10) -> None:
    with open_run(made, str(root), "gpt") as run:
        checkpoints = Checkpointer(
            run.uri, {"kind": made.kind, **made.model_dump()}, driver=run.token
        )
        checkpoints.save(step, {"model": {"w": torch.zeros(1)}})
        checkpoints.join()


def start(root: Path, made: Config) -> int:
    """Return the step from which the run would resume."""
    with open_run(made, str(root), "gpt") as run:
        return run.start


def test_resume_auto_resumes_never_refuses_and_must_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.resume is must, and .* has no complete checkpoint"):
        start(tmp_path, config(**{"run.resume": "must"}))
    assert not (tmp_path / "runs").exists()
    assert start(tmp_path, config()) == 0
    write_checkpoint(tmp_path, config())
    assert start(tmp_path, config()) == 10
    assert start(tmp_path, config(**{"run.resume": "must"})) == 10
    with pytest.raises(
        ValueError, match=r"run.resume is never, and run r has a checkpoint of step 10"
    ):
        start(tmp_path, config(**{"run.resume": "never"}))


def test_changed_config_is_refused_unless_the_key_may_change(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config())
    with pytest.raises(
        ValueError, match=r"run r was started with optim.lr 0.005, and now it is 0.1"
    ):
        start(tmp_path, config(**{"optim.lr": 0.1}))
    for key, value in {"run.seed": 5, "parallel.precision": "bf16", "data.vocab_size": 600}.items():
        with pytest.raises(ValueError, match=f"run r was started with {key}"):
            start(tmp_path, config(**{key: value}))
    assert (
        start(
            tmp_path,
            config(**{"parallel.workers": 2, "batch.micro_size": 2, "steps": 40, "log.every": 1}),
        )
        == 10
    )
    with pytest.raises(ValueError, match=r"at step 10, beyond steps 5"):
        start(tmp_path, config(steps=5))


def test_unnamed_run_is_named_after_its_preset(tmp_path: Path) -> None:
    with open_run(config(**{"run.name": None}), str(tmp_path), "gpt-tiny") as run:
        assert run.name.startswith("gpt-tiny-")
        assert configs.load("gpt", f"{run.uri}/run.yaml") == config(**{"run.name": None})


def test_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with (
        open_run(config(), str(tmp_path), "gpt"),
        pytest.raises(ValueError, match=rf"run r is driven by process {os.getpid()}"),
    ):
        start(tmp_path, config())
    assert start(tmp_path, config()) == 0


def test_run_is_free_after_its_driver_was_killed(tmp_path: Path) -> None:
    holder = f"""
import time
from train.config import loader as configs
from train.run.folder import open_run
with open_run(configs.load("gpt", "gpt-tiny", {{"run.name": "r"}}), {str(tmp_path)!r}, "gpt"):
    print("held", flush=True)
    time.sleep(60)
"""
    root = Path(__file__).parent.parent
    other = subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"driven by process {other.pid}"):
        start(tmp_path, config())
    other.kill()
    other.wait()
    assert start(tmp_path, config()) == 0


def test_driver_on_another_host_is_dead_after_its_last_heartbeat(tmp_path: Path) -> None:
    elsewhere = {
        "token": "t",
        "host": "another-" + socket.gethostname(),
        "pid": 1,
        "started": psutil.Process().create_time(),
    }
    storage.write_json(tmp_path / "runs/r/driver.json", {**elsewhere, "heartbeat": time.time() - 5})
    with pytest.raises(ValueError, match=r"driven by process 1 on another-"):
        start(tmp_path, config())
    storage.write_json(
        tmp_path / "runs/r/driver.json", {**elsewhere, "heartbeat": time.time() - 600}
    )
    assert start(tmp_path, config()) == 0
