"""A run that loses workers, its driver, a machine or disk space ends as an uninterrupted one does.

KILN_FAULT_TABLE=FILE writes what the slow matrix measured, as Markdown.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from cluster import storage
from tests.support import nodes, workers
from tests.support.paths import ROOT
from train.config import loader
from train.config.sections import Config
from train.data.dataset import Dataset
from train.run import checkpoint, records
from train.verify import command as verify
from train.verify import compare
from train.verify.faults import Fault
from train.verify.verdict import Verdict, compare_runs

STEPS, EVERY = 60, 10
SHAPE = {
    "data.vocab_size": 300,
    "model.width": 64,
    "model.dropout": 0.1,
    "batch.global_size": 24,
    "batch.micro_size": 4,  # accumulated: 3 times by two workers, twice by three
    "steps": STEPS,
    "checkpoint.every": EVERY,
    "checkpoint.keep_last": STEPS,
    "log.every": 1,
    "log.eval_every": STEPS,
    "log.sample_every": STEPS,
}
STRATEGIES = {
    "ddp": {},
    **{
        f"zero{stage}": {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
        for stage in (1, 2, 3)
    },
}
# Largest difference after STEPS steps of Adam at 5e-3 where another number of workers forms the
# sums; see test_strategy.
DRIFT = 1e-4
TRAIN_LIMIT_S = 180
Command = Callable[..., CompletedProcess[str]]


def config_of(corpus: str, name: str | None = None, **values: Any) -> Config:
    return loader.load(
        "gpt", "gpt-tiny", {**SHAPE, "data.source": corpus, "run.name": name, **values}
    )


def arguments(config: Config, root: str) -> list[str]:
    """Return arguments of `python -m` that train `config`.

    Its file is beside the storage, which may be full.
    """
    file = Path(f"{root}-{config.run.name}.yaml")
    file.write_text(config.to_yaml())
    return ["train", config.kind, "--config", str(file), "--storage", root]


def uri(root: str, name: str) -> str:
    return storage.join(root, "runs", name)


def compare_with(root: str, uninterrupted: str, name: str) -> Verdict:
    return compare_runs(uri(root, uninterrupted), uri(root, name), [], tolerance=0)


# ---- a machine is lost


def train_and_strike(
    config: Config, root: str, strike: Callable[[], None]
) -> CompletedProcess[str]:
    """Train, and call `strike` once after the first checkpoint."""
    log = Path(uri(root, str(config.run.name)), "metrics.jsonl")
    with subprocess.Popen(
        [sys.executable, "-m", *arguments(config, root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        try:
            limit = time.monotonic() + TRAIN_LIMIT_S
            while not (log.is_file() and len(log.read_text().splitlines()) > EVERY + 2):
                assert driver.poll() is None, f"the run ended too early: {driver.communicate()}"
                assert time.monotonic() < limit, "the run does not train"
                time.sleep(0.05)
            strike()
            stdout, stderr = driver.communicate(timeout=TRAIN_LIMIT_S)
        finally:
            driver.kill()
    return CompletedProcess(driver.args, driver.returncode, stdout, stderr)


def lose_a_node(
    config: Config, root: str, machines: nodes.Nodes
) -> tuple[CompletedProcess[str], float]:
    """Train, and kill one of the nodes that train.

    Returns:
        The finished command, and when the node was killed (Unix, seconds).
    """
    killed: list[float] = []

    def strike() -> None:
        victim = machines.training()[-1]
        killed.append(time.time())
        machines.kill(victim)

    return train_and_strike(config, root, strike), killed[0]


def seconds_to_the_next_step(run_uri: str, killed: float) -> float:
    """Return the time from a kill to the first step after the resume; fail where there was no
    resume."""
    start = records.starts(run_uri)[-1]
    assert start["time"] > killed, "the kill came too late"
    first = start["step"] + 1
    return min(row["time"] for row in records.metrics(run_uri) if row["step"] == first) - killed


def train_without_ray(rank: int, corpus: str, dataset: Dataset, run_uri: str) -> None:
    workers.run(config_of(corpus, None, **{"parallel.workers": 2}), dataset, run_uri)


def test_run_that_loses_a_machine_equals_uninterrupted_one(corpus: str, tmp_path: Path) -> None:
    root = str(tmp_path / "kiln")
    with nodes.cluster(3) as machines, machines.joined():
        done, killed = lose_a_node(
            config_of(corpus, "killed", **{"parallel.workers": 2}), root, machines
        )
    assert done.returncode == 0, done.stderr
    assert seconds_to_the_next_step(uri(root, "killed"), killed) > 0
    assert f"killed: step {STEPS}/{STEPS}" in done.stdout, "the driver did not show the last step"
    (name,) = storage.names(f"{root}/data")
    dataset = Dataset.open(f"{root}/data/{name}")
    workers.spawn(2, train_without_ray, corpus, dataset, uri(root, "uninterrupted"))
    compared = [
        *compare.metrics(
            storage.read_json(f"{uri(root, 'uninterrupted')}/rows.json"),
            records.metrics(uri(root, "killed")),
        ),
        *compare.checkpoints(uri(root, "uninterrupted"), uri(root, "killed")),
    ]
    assert len(compared) > STEPS
    assert [item for item in compared if item.difference] == []


# ---- every strategy, every fault

FAULTS = {
    "worker in a step": Fault(2 * EVERY + 3, rank=1),
    "worker in an upload": Fault(3 * EVERY, "upload"),
    "driver": Fault(4 * EVERY + 3, target="driver"),
}
Cells = dict[tuple[str, int], dict[str, str]]


@pytest.fixture(scope="module")
def machines() -> Iterator[nodes.Nodes]:
    """Start nodes for three workers, and a spare."""
    with nodes.cluster(4) as machines, machines.joined():
        yield machines


@pytest.fixture(scope="module")
def kiln(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("matrix") / "kiln")


@pytest.fixture(scope="module")
def table() -> Iterator[Cells]:
    """Collect the result of each cell; written to KILN_FAULT_TABLE at the end."""
    cells: Cells = defaultdict(dict)
    yield cells
    if file := os.environ.get("KILN_FAULT_TABLE"):
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        lines = [
            "| strategy | workers | " + " | ".join(columns) + " |",
            "| --- | --- |" + " --- |" * len(columns),
        ]
        lines += [
            f"| {strategy} | {workers} | "
            + " | ".join(row.get(column, "") for column in columns)
            + " |"
            for (strategy, workers), row in cells.items()
        ]
        Path(file).write_text("\n".join(lines) + "\n")


def uninterrupted_run(kiln: str, corpus: str, command: Command, strategy: str, workers: int) -> str:
    """Return the name of the uninterrupted run of a row; train it where it is missing."""
    name = f"uninterrupted-{strategy}-{workers}"
    if not storage.exists(storage.join(uri(kiln, name), "summary.json")):
        config = config_of(corpus, name, **STRATEGIES[strategy], **{"parallel.workers": workers})
        done = command(*arguments(config, kiln))
        assert done.returncode == 0, done.stderr
    return name


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "machine"])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_equals_uninterrupted_run_after_every_fault(
    machines: nodes.Nodes,
    table: Cells,
    kiln: str,
    corpus: str,
    command: Command,
    strategy: str,
    workers: int,
    fault: str,
) -> None:
    uninterrupted = uninterrupted_run(kiln, corpus, command, strategy, workers)
    config = config_of(
        corpus,
        f"killed-{strategy}-{workers}",
        **STRATEGIES[strategy],
        **{"parallel.workers": workers},
    )
    if fault in FAULTS:
        verdict = verify.verify(config, kiln, [FAULTS[fault]], uninterrupted=uninterrupted)
        (kill,) = verdict.kills
        recovery_s = kill.recovery_s
    else:
        done, killed = lose_a_node(config, kiln, machines)
        machines.add()
        assert done.returncode == 0, done.stderr
        recovery_s = seconds_to_the_next_step(uri(kiln, str(config.run.name)), killed)
        verdict = compare_with(kiln, uninterrupted, str(config.run.name))
    table[strategy, workers][fault] = f"{verdict.largest_difference:g}, {recovery_s:.0f} s"
    assert verdict.equal, verdict.first_difference


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_run_resumes_with_fewer_workers_after_a_machine_is_lost(
    machines: nodes.Nodes, table: Cells, kiln: str, corpus: str, command: Command, strategy: str
) -> None:
    """The samples and their order are the same; without dropout, whose noise each worker draws."""
    variant = {**STRATEGIES[strategy], "model.dropout": 0.0}
    three, name = {**variant, "parallel.workers": 3}, f"left-{strategy}"
    uninterrupted = f"uninterrupted-left-{strategy}"
    done = command(*arguments(config_of(corpus, uninterrupted, **three), kiln))
    assert done.returncode == 0, done.stderr
    lost, killed = lose_a_node(
        config_of(corpus, name, **three, **{"run.max_failures": 0}), kiln, machines
    )
    machines.add()
    assert lost.returncode == 1
    assert f"start --run.name {name} again to resume from its newest checkpoint" in lost.stderr
    two = command(*arguments(config_of(corpus, name, **variant, **{"parallel.workers": 2}), kiln))
    assert two.returncode == 0, two.stderr
    seconds_to_the_next_step(uri(kiln, name), killed)
    verdict = compare_with(kiln, uninterrupted, name)
    table[strategy, 3]["machine, then 2 workers"] = f"{verdict.largest_difference:.0e}"
    assert 0 < verdict.largest_difference < DRIFT, verdict.first_difference


# ---- storage fails


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a small disk, or remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        remount = ["-o", "remount"] if folder.is_mount() else []
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *remount, "-o", options, "raykiln-test", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"this machine cannot mount a disk: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def trained(
    ray_address: str, corpus: str, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Return a storage with an run `uninterrupted`."""
    root = str(tmp_path_factory.mktemp("trained") / "kiln")
    done = command(*arguments(config_of(corpus, "uninterrupted", **{"parallel.workers": 2}), root))
    assert done.returncode == 0, done.stderr
    return root


def error_of(done: CompletedProcess[str]) -> str:
    """Return the one line with which a command failed."""
    assert "Traceback" not in done.stdout + done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.slow
def test_run_ends_on_a_full_disk_and_resumes_on_a_larger_one(
    trained: str, corpus: str, command: Command, disk: Callable[[str], Path], tmp_path: Path
) -> None:
    root, config = str(disk("size=6m")), config_of(corpus, "full", **{"parallel.workers": 2})
    shutil.copytree(f"{trained}/data", f"{root}/data")
    full = command(*arguments(config, root))
    assert full.returncode == 1, full.stdout + full.stderr
    # Either the upload fails first, or the curves that are written while it fills the disk.
    assert re.search(
        r"(a checkpoint could not|nothing can) be written (below|to) "
        + re.escape(uri(root, "full")),
        error_of(full),
    )
    assert "No space left on device" in error_of(full)
    assert len(records.starts(uri(root, "full"))) == 1, "the run was restarted on a full disk"
    older = checkpoint.complete(uri(root, "full"))
    assert 0 < len(older) < STEPS // EVERY
    disk("size=64m")
    again = command(*arguments(config, root))
    assert again.returncode == 0, again.stderr
    assert f"resumes from step {older[0].step}," in again.stdout
    verdict = compare_runs(uri(trained, "uninterrupted"), uri(root, "full"), [], tolerance=0)
    assert verdict.equal, verdict.first_difference


@pytest.mark.slow
def test_run_ends_when_others_fill_the_disk(
    ray_address: str, corpus: str, disk: Callable[[str], Path]
) -> None:
    """Between two checkpoints, so that writing rank 0's curves fails first."""
    folder = disk("size=24m")

    def fill() -> None:
        with suppress(OSError), (folder / "of others").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    config = config_of(
        corpus, "full", **{"parallel.workers": 2, "steps": 400, "checkpoint.every": 400}
    )
    full = train_and_strike(config, str(folder), fill)
    assert full.returncode == 1, full.stdout + full.stderr
    assert (
        f"nothing can be written to {uri(str(folder), 'full')} ([Errno 28] No space left on device"
        in error_of(full)
    )


def test_read_only_storage_is_an_error_before_any_worker_starts(
    ray_address: str, corpus: str, command: Command, disk: Callable[[str], Path]
) -> None:
    root = str(disk("ro"))
    done = command(*arguments(config_of(corpus, "refused"), root))
    assert done.returncode == 2, done.stdout + done.stderr
    assert root in error_of(done)


@pytest.mark.slow
def test_run_resumes_from_the_newest_undamaged_checkpoint_and_names_the_others(
    trained: str, corpus: str, command: Command
) -> None:
    """The newest one is too short, which the driver finds; a byte of the next is wrong, which the
    workers find."""
    name, newest, next_one = "damaged", f"step_{STEPS:06d}", f"step_{STEPS - EVERY:06d}"
    shutil.copytree(uri(trained, "uninterrupted"), uri(trained, name))
    os.truncate(f"{uri(trained, name)}/checkpoints/{newest}/model.safetensors", 1000)
    with open(f"{uri(trained, name)}/checkpoints/{next_one}/model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    done = command(*arguments(config_of(corpus, name, **{"parallel.workers": 2}), trained))
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert f"checkpoint {newest} is skipped: model.safetensors should have" in output
    assert f"checkpoint {next_one} is skipped" in output
    assert "its hash is not the one in manifest.json" in output
    assert records.starts(uri(trained, name))[-1]["step"] == STEPS - 2 * EVERY
    verdict = compare_with(trained, "uninterrupted", name)
    assert verdict.equal, verdict.first_difference
