"""A run loses workers, its driver, whole machines or the room on its disk, and ends as if nothing had been.

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
from train.config import loader as configs
from train.config.sections import Config
from train.run import checkpoint, records
from train.verify import compare, verify
from train.verify.faults import Fault

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
DRIFT = 1e-4  # of anything in STEPS steps of Adam at 5e-3, where the sums are formed by another number of workers; see test_strategy
TRAIN_LIMIT_S = 180
Command = Callable[..., CompletedProcess[str]]


def config_of(corpus: str, name: str | None = None, **values: Any) -> Config:
    return configs.load(
        "gpt", "gpt-tiny", {**SHAPE, "data.source": corpus, "run.name": name, **values}
    )


def arguments(config: Config, root: str) -> list[str]:
    """`python -m train` with a config, which lies beside the storage: that may be full."""
    file = Path(f"{root}-{config.run.name}.yaml")
    file.write_text(config.to_yaml())
    return ["train", config.kind, "--config", str(file), "--storage", root]


def uri(root: str, name: str) -> str:
    return storage.join(root, "runs", name)


def judged(root: str, straight: str, name: str) -> verify.Verdict:
    return verify.judge(uri(root, straight), uri(root, name), [], tolerance=0)


# ---------------------------------------------------------------- a machine is lost


def interrupted(config: Config, root: str, strike: Callable[[], None]) -> CompletedProcess[str]:
    """Trains, and strikes once after the first checkpoint."""
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
            said, complaints = driver.communicate(timeout=TRAIN_LIMIT_S)
        finally:
            driver.kill()
    return CompletedProcess(driver.args, driver.returncode, said, complaints)


def lose_a_node(
    config: Config, root: str, machines: nodes.Nodes
) -> tuple[CompletedProcess[str], float]:
    """Trains, and kills one of the nodes that train; what the command said, and when the node died (Unix)."""
    killed: list[float] = []

    def strike() -> None:
        victim = machines.training()[-1]
        killed.append(time.time())
        machines.kill(victim)

    return interrupted(config, root, strike), killed[0]


def seconds_to_the_next_step(run_uri: str, killed: float) -> float:
    """From a kill to the first step of the start after it; that there is one shows that the kill hit the run."""
    start = records.starts(run_uri)[-1]
    assert start["time"] > killed, "the kill came too late"
    return (
        min(row["time"] for row in records.metrics(run_uri) if row["step"] == start["step"] + 1)
        - killed
    )


def calm_without_ray(rank: int, corpus: str, dataset: str, run_uri: str) -> None:
    workers.run(config_of(corpus, None, **{"parallel.workers": 2}), dataset, run_uri)


def test_a_lost_machine_costs_time_and_nothing_else(corpus: str, tmp_path: Path) -> None:
    root = str(tmp_path / "kiln")
    with nodes.cluster(3) as machines, machines.joined():
        done, killed = lose_a_node(
            config_of(corpus, "stormy", **{"parallel.workers": 2}), root, machines
        )
    assert done.returncode == 0, done.stderr
    assert seconds_to_the_next_step(uri(root, "stormy"), killed) > 0
    assert f"stormy: step {STEPS}/{STEPS}" in done.stdout, (
        "the driver did not see the run to its end"
    )
    (dataset,) = storage.names(f"{root}/data")
    workers.spawn(2, calm_without_ray, corpus, f"{root}/data/{dataset}", uri(root, "calm"))
    compared = [
        *compare.metrics(
            storage.read_json(f"{uri(root, 'calm')}/rows.json"),
            records.metrics(uri(root, "stormy")),
        ),
        *compare.checkpoints(uri(root, "calm"), uri(root, "stormy")),
    ]
    assert len(compared) > STEPS
    assert [item for item in compared if item.difference] == []


# ---------------------------------------------------------------- every strategy, every fault

FAULTS = {
    "worker in a step": Fault(2 * EVERY + 3, rank=1),
    "worker in an upload": Fault(3 * EVERY, "upload"),
    "driver": Fault(4 * EVERY + 3, target="driver"),
}
Cells = dict[tuple[str, int], dict[str, str]]


@pytest.fixture(scope="module")
def machines() -> Iterator[nodes.Nodes]:
    """Nodes for three workers and a spare."""
    with nodes.cluster(4) as machines, machines.joined():
        yield machines


@pytest.fixture(scope="module")
def kiln(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("matrix") / "kiln")


@pytest.fixture(scope="module")
def table() -> Iterator[Cells]:
    """What each cell came to; written to KILN_FAULT_TABLE at the end."""
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


def straight(kiln: str, corpus: str, command: Command, strategy: str, workers: int) -> str:
    """The name of the uninterrupted run that serves a whole row."""
    name = f"straight-{strategy}-{workers}"
    if not storage.exists(storage.join(uri(kiln, name), "summary.json")):
        config = config_of(corpus, name, **STRATEGIES[strategy], **{"parallel.workers": workers})
        done = command(*arguments(config, kiln))
        assert done.returncode == 0, done.stderr
    return name


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "machine"])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_survives_every_fault(
    machines: nodes.Nodes,
    table: Cells,
    kiln: str,
    corpus: str,
    command: Command,
    strategy: str,
    workers: int,
    fault: str,
) -> None:
    calm = straight(kiln, corpus, command, strategy, workers)
    config = config_of(
        corpus,
        f"killed-{strategy}-{workers}",
        **STRATEGIES[strategy],
        **{"parallel.workers": workers},
    )
    if fault in FAULTS:
        verdict = verify.verify(config, kiln, [FAULTS[fault]], straight=calm)
        (recovery_s,) = verdict.recoveries_s
    else:
        done, killed = lose_a_node(config, kiln, machines)
        machines.add()
        assert done.returncode == 0, done.stderr
        recovery_s = seconds_to_the_next_step(uri(kiln, str(config.run.name)), killed)
        verdict = judged(kiln, calm, str(config.run.name))
    table[strategy, workers][fault] = f"{verdict.largest_difference:g}, {recovery_s:.0f} s"
    assert verdict.equal, verdict.first_difference


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_machine_that_is_not_replaced_leaves_the_run_to_the_others(
    machines: nodes.Nodes, table: Cells, kiln: str, corpus: str, command: Command, strategy: str
) -> None:
    """The same samples in the same order; without dropout, whose noise is drawn by each worker."""
    variant = {**STRATEGIES[strategy], "model.dropout": 0.0}
    three, name = {**variant, "parallel.workers": 3}, f"left-{strategy}"
    calm = command(*arguments(config_of(corpus, f"calm-{strategy}", **three), kiln))
    assert calm.returncode == 0, calm.stderr
    lost, killed = lose_a_node(
        config_of(corpus, name, **three, **{"run.max_failures": 0}), kiln, machines
    )
    machines.add()
    assert lost.returncode == 1
    assert f"--run.name {name} goes on from its newest checkpoint" in lost.stderr
    two = command(*arguments(config_of(corpus, name, **variant, **{"parallel.workers": 2}), kiln))
    assert two.returncode == 0, two.stderr
    seconds_to_the_next_step(uri(kiln, name), killed)
    verdict = judged(kiln, f"calm-{strategy}", name)
    table[strategy, 3]["machine, then 2 workers"] = f"{verdict.largest_difference:.0e}"
    assert 0 < verdict.largest_difference < DRIFT, verdict.first_difference


# ---------------------------------------------------------------- storage fails


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk, and mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        remount = ["-o", "remount"] if place.is_mount() else []
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *remount, "-o", options, "raykiln-test", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def calm(
    ray_address: str, corpus: str, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A storage with an uninterrupted run `calm`."""
    root = str(tmp_path_factory.mktemp("calm") / "kiln")
    done = command(*arguments(config_of(corpus, "calm", **{"parallel.workers": 2}), root))
    assert done.returncode == 0, done.stderr
    return root


def error_of(done: CompletedProcess[str]) -> str:
    """The one sentence with which a command failed."""
    assert "Traceback" not in done.stdout + done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return sentence


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    calm: str, corpus: str, command: Command, disk: Callable[[str], Path], tmp_path: Path
) -> None:
    root, config = str(disk("size=6m")), config_of(corpus, "full", **{"parallel.workers": 2})
    shutil.copytree(f"{calm}/data", f"{root}/data")
    full = command(*arguments(config, root))
    assert full.returncode == 1, full.stdout + full.stderr
    # Who is first to find no room, the upload or the curves while it fills the disk, is a race.
    assert re.search(
        rf"(a checkpoint could not|nothing can) be written (below|to) {re.escape(uri(root, 'full'))}",
        error_of(full),
    )
    assert "No space left on device" in error_of(full)
    assert len(records.starts(uri(root, "full"))) == 1, "a full disk was tried again"
    older = checkpoint.complete(uri(root, "full"))
    assert 0 < len(older) < STEPS // EVERY
    disk("size=64m")
    again = command(*arguments(config, root))
    assert again.returncode == 0, again.stderr
    assert f"goes on from step {older[0].step}," in again.stdout
    verdict = verify.judge(uri(calm, "calm"), uri(root, "full"), [], tolerance=0)
    assert verdict.equal, verdict.first_difference


@pytest.mark.slow
def test_a_disk_that_others_fill_is_tried_once_more(
    ray_address: str, corpus: str, disk: Callable[[str], Path]
) -> None:
    """Between two checkpoints: rank 0's curves are the first that find no room."""
    place = disk("size=24m")

    def fill() -> None:
        with suppress(OSError), (place / "of others").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    config = config_of(
        corpus, "full", **{"parallel.workers": 2, "steps": 400, "checkpoint.every": 400}
    )
    full = interrupted(config, str(place), fill)
    assert full.returncode == 1, full.stdout + full.stderr
    assert (
        f"nothing can be written to {uri(str(place), 'full')} ([Errno 28] No space left on device"
        in error_of(full)
    )


def test_a_store_that_cannot_be_written_is_a_sentence_before_any_worker(
    ray_address: str, corpus: str, command: Command, disk: Callable[[str], Path]
) -> None:
    root = str(disk("ro"))
    done = command(*arguments(config_of(corpus, "refused"), root))
    assert done.returncode == 2, done.stdout + done.stderr
    assert root in error_of(done)


@pytest.mark.slow
def test_the_newest_checkpoint_that_is_whole_is_used_and_the_others_are_named(
    calm: str, corpus: str, command: Command
) -> None:
    """The newest is too short, as the driver sees; of the next a byte is wrong, as the workers see when they read it."""
    name, newest, next_one = "damaged", f"step_{STEPS:06d}", f"step_{STEPS - EVERY:06d}"
    shutil.copytree(uri(calm, "calm"), uri(calm, name))
    os.truncate(f"{uri(calm, name)}/checkpoints/{newest}/model.safetensors", 1000)
    with open(f"{uri(calm, name)}/checkpoints/{next_one}/model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    done = command(*arguments(config_of(corpus, name, **{"parallel.workers": 2}), calm))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"checkpoint {newest} is skipped: model.safetensors should have" in said
    assert f"checkpoint {next_one} is skipped" in said
    assert "its hash is not the one in manifest.json" in said
    assert records.starts(uri(calm, name))[-1]["step"] == STEPS - 2 * EVERY
    verdict = judged(calm, "calm", name)
    assert verdict.equal, verdict.first_difference
