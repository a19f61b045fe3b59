"""verify-resume: a killed run equals an uninterrupted one, and differences are found."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from cluster import storage
from tests.support import workers
from train import __main__ as train
from train.config import loader
from train.config.sections import Config
from train.data.dataset import Dataset
from train.gpt import loop
from train.parallel import backends
from train.parallel.state import State
from train.run.checkpoint import Checkpointer
from train.verify import command as verify
from train.verify import compare, faults, verdict
from train.verify.faults import Fault
from train.verify.options import BROKEN_RESTORES

DROPOUT = {"model.dropout": 0.1}
TWO_WORKERS = {"parallel.workers": 2, "batch.global_size": 8, "batch.micro_size": 2}
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


@pytest.fixture(scope="module")
def kiln(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a storage with a small corpus."""
    root = tmp_path_factory.mktemp("kiln")
    (root / "corpus.txt").write_text("".join(f"{number}: {VERSE}" for number in range(120)))
    return str(root)


def config_of(kiln: str, **values: Any) -> Config:
    return loader.load(
        "gpt", "gpt-tiny", {"data.source": f"{kiln}/corpus.txt", "data.vocab_size": 300, **values}
    )


def arguments(kiln: str, *more: str) -> list[str]:
    keys = [
        word for key, value in (DROPOUT | TWO_WORKERS).items() for word in (f"--{key}", str(value))
    ]
    data = ["--data.source", f"{kiln}/corpus.txt", "--data.vocab_size", "300"]
    return ["gpt", "--config", "gpt-tiny", *data, *keys, "--storage", kiln, *more]


# ---- whole runs


@pytest.fixture(scope="module")
def killed(kiln: str, command: Callable[..., CompletedProcess[str]]) -> CompletedProcess[str]:
    """Run the command with every kind of kill and keep its runs."""
    return command("train", "verify-resume", *arguments(kiln, "--keep", "--seed", "3"), timeout=900)


def test_run_killed_in_every_way_equals_uninterrupted_one(
    killed: CompletedProcess[str],
) -> None:
    assert killed.returncode == 0, killed.stdout + killed.stderr
    *_, last = killed.stdout.splitlines()
    # Every step has loss, gradient norm and learning rate, and the last one two more metrics.
    assert last.startswith(f"equal: 24 steps, 4 kills, {24 * 3 + 2} metrics and ")
    assert last.endswith("tensors, bit for bit")
    table = killed.stdout.split("seconds to the next step\n")[1].splitlines()[:4]
    assert sum(line.startswith("the driver") for line in table) == 1
    assert sum("step 12's checkpoint" in line and " step 6 " in line for line in table) == 1, (
        "resumed past an unfinished checkpoint"
    )


def test_broken_restore_is_found(kiln: str, killed: CompletedProcess[str]) -> None:
    config = verify.shortened(config_of(kiln, **DROPOUT, **TWO_WORKERS), 24)
    names = storage.names(f"{kiln}/runs")
    (uninterrupted,) = (name for name in names if name.endswith("-uninterrupted"))
    plan = verify.plan_kills(["upload"], config)
    broken = verify.verify(config, kiln, plan, uninterrupted=uninterrupted, broken_restore="order")
    assert not broken.equal
    # Killed during the upload of step 12's checkpoint and resumed from step 6: step 7 is the first
    # that can differ.
    assert " at step 7: " in str(broken.first_difference)
    kill = "after the kill of worker 0 during the upload of step 12's checkpoint"
    assert f"({kill}, resumed from step 6)" in str(broken.first_difference)
    assert {uninterrupted, broken.killed} <= set(storage.names(f"{kiln}/runs"))
    *_, result, runs = verdict.table(broken, 24).splitlines()
    assert result == f"different: {broken.first_difference}"
    assert uninterrupted in runs
    assert broken.killed in runs


@pytest.mark.slow
def test_gan_equals_too_and_an_uninterrupted_run_is_reused(
    ray_address: str, tmp_path: Path
) -> None:
    config = verify.shortened(
        loader.load("gan", "gan-tiny", {"parallel.workers": 2, "batch.micro_size": 4}), 12
    )
    root = str(tmp_path)
    first = verify.verify(config, root, verify.plan_kills(["worker", "driver"], config), keep=True)
    assert first.equal, first.first_difference
    assert all(kill.recovery_s for kill in first.kills)
    assert len(first.kills) == 2
    again = verify.verify(
        config,
        root,
        verify.plan_kills(["upload", "random", "random"], config, seed=1),
        uninterrupted=first.uninterrupted,
    )
    assert again.equal, again.first_difference
    assert storage.names(f"{root}/runs") == sorted([first.uninterrupted, first.killed])
    # Killed before the first checkpoint, so it starts over.
    early = verify.verify(
        config,
        root,
        [Fault(1), Fault(2, target="driver", rank=1)],
        uninterrupted=first.uninterrupted,
    )
    assert early.equal, early.first_difference
    assert [kill.resumed_from for kill in early.kills] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_broken_restore_of_shards_is_found(kiln: str, stage: int) -> None:
    strategy = {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
    config = verify.shortened(config_of(kiln, **TWO_WORKERS, **strategy), 8)
    plan, uninterrupted = verify.plan_kills(["upload"], config), None
    for what in BROKEN_RESTORES:
        broken = verify.verify(config, kiln, plan, uninterrupted=uninterrupted, broken_restore=what)
        uninterrupted = broken.uninterrupted
        assert not broken.equal
        # Resumed from step 2; moments change an update, which shows in the step after it.
        assert f" at step {4 if what == 'optimizer' else 3}: " in str(broken.first_difference)


# ---- broken restores, without Ray


STEPS = 6


Reference = tuple[Config, Dataset, str, list[dict[str, float]]]


@pytest.fixture(scope="module")
def reference(kiln: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Train in this process; return config, data set, folder and rows."""
    config = config_of(
        kiln,
        steps=STEPS,
        **{"checkpoint.every": STEPS // 2, "checkpoint.keep_last": 5, "log.every": 1},
    )
    dataset, uri = workers.prepare(config, kiln), str(tmp_path_factory.mktemp("reference"))
    return config, dataset, uri, workers.run(config, dataset, uri).rows


@pytest.mark.parametrize(
    ("what", "first"), [(None, None), ("order", 4), ("weights", 4), ("optimizer", 5)]
)
def test_broken_restore_shows_in_the_first_step_that_it_can_change(
    reference: Reference,
    tmp_path: Path,
    what: str | None,
    first: int | None,
) -> None:
    config, dataset, uri, rows = reference
    shutil.copytree(f"{uri}/checkpoints/step_000003", tmp_path / "checkpoints/step_000003")
    checkpoints = Checkpointer(str(tmp_path), config.model_dump(), keep_last=5)
    start = checkpoints.load()
    assert start is not None
    broken, state = faults.break_restore(what, config, start[1]) if what else (config, start[1])
    recorder = workers.MemoryRecorder()
    loop.train(
        workers.LocalWorker(broken, backends.build(config), checkpoints, recorder, dataset),
        (start[0], state),
    )
    recorded = [row for row in rows if row["step"] <= STEPS // 2] + recorder.rows
    metrics = [item.step for item in compare.metrics(rows, recorded) if item.difference]
    tensors = [
        item
        for item in compare.checkpoints(uri, str(tmp_path))
        if item.difference and item.step == STEPS
    ]
    # Moments change an update, which shows in the next step's loss.
    assert min(metrics, default=None) == first
    assert bool(tensors) == (what is not None)


# ---- comparing

ROWS = [
    {"step": 1, "time": 1.0, "loss": 2.5, "tokens_per_s": 10.0, "data_s": 0.1, "mfu": 0.2},
    {"step": 2, "time": 2.0, "loss": 2.4},
    {"step": 2, "time": 2.5, "heldout_loss": 2.6},
]


def test_metrics_that_depend_on_the_clock_are_not_compared() -> None:
    later = [
        {
            metric: value + (metric in {"time", "tokens_per_s", "data_s", "mfu"})
            for metric, value in row.items()
        }
        for row in ROWS
    ]
    compared = list(compare.metrics(ROWS, later))
    assert [item.what for item in compared] == [
        "loss at step 1",
        "heldout_loss at step 2",
        "loss at step 2",
    ]
    assert not any(item.difference for item in compared)


def test_difference_in_the_last_bit_of_a_metric_is_found() -> None:
    other = [ROWS[0], {**ROWS[1], "loss": math.nextafter(2.4, 3)}, ROWS[2]]
    (found,) = [item for item in compare.metrics(ROWS, other) if not item.within(0)]
    assert (found.step, found.difference) == (2, "2.4 uninterrupted, 2.4000000000000004 killed")
    assert found.within(1e-12)


def test_missing_step_is_a_difference() -> None:
    missing = [item for item in compare.metrics(ROWS, ROWS[:2]) if item.difference]
    assert [(item.what, item.difference, item.absolute) for item in missing] == [
        ("heldout_loss at step 2", "only in the uninterrupted run", math.inf)
    ]
    assert not missing[0].within(1.0)
    assert [item.difference for item in compare.metrics(ROWS[:2], ROWS) if item.difference] == [
        "only in the killed run"
    ]


def test_difference_in_any_bit_of_a_state_is_found() -> None:
    tensor = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    changed_tensor = tensor.clone()
    changed_tensor[0, 1] = -2.5
    state: State = {
        "model": {"a": tensor, "b": torch.tensor(1.0)},
        "model_progress": {"updates": 3},
    }

    def differences(**changed: Any) -> list[tuple[str, str]]:
        return [
            (item.what, item.difference)
            for item in compare.states(9, state, state | changed)
            if item.difference
        ]

    assert differences() == []
    assert differences(model={"a": changed_tensor, "b": torch.tensor(1.0)}) == [
        ("model a in the checkpoint of step 9", "differs by up to 5.0e-01")
    ]
    assert differences(model={"a": tensor.mul(-1).mul(-1).sub(0), "b": torch.tensor(1.0)}) == []
    negative_zero = tensor * torch.tensor([[1, 1], [-1, 1]])
    assert len(differences(model={"a": negative_zero, "b": torch.tensor(1.0)})) == 1, (
        "-0.0 differs from 0.0"
    )
    assert differences(model={"a": tensor}) == [
        ("model b in the checkpoint of step 9", "only in the uninterrupted run")
    ]
    assert len(differences(model={"a": tensor.double(), "b": torch.tensor(1.0)})) == 1
    assert differences(model_progress={"updates": 4}) == [
        ("model_progress updates in the checkpoint of step 9", "3 uninterrupted, 4 killed")
    ]


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}, [None], {"gap": None}])
def test_every_json_value_of_a_state_is_equal_to_itself_only(value: object) -> None:
    (same,) = compare.states(6, {"alarms": {"gap": value}}, {"alarms": {"gap": value}})
    assert same.difference == ""
    (missing,) = compare.states(6, {"alarms": {"gap": value}}, {"alarms": {}})
    assert missing.difference == "only in the uninterrupted run"
    (other,) = compare.states(6, {"alarms": {}}, {"alarms": {"gap": value}})
    assert other.difference == "only in the killed run"
    (changed,) = compare.states(6, {"alarms": {"gap": value}}, {"alarms": {"gap": "another"}})
    assert not changed.within(1.0)


def test_relative_difference_of_a_tensor_is_to_its_largest_magnitude() -> None:
    one, other = torch.tensor([1000.0, 0.001]), torch.tensor([1000.0, 0.002])
    (found,) = compare.states(1, {"m": {"w": one}}, {"m": {"w": other}})
    assert found.absolute == pytest.approx(0.001)
    assert found.within(1e-5)
    assert not found.within(1e-7)
    (broken,) = compare.states(1, {"m": {"w": one}}, {"m": {"w": one * math.nan}})
    assert not broken.within(1e9)


def test_verdict_names_the_kill_before_the_first_difference(tmp_path: Path) -> None:
    for name, second in (("uninterrupted", 2.4), ("killed", 2.3)):
        storage.write_bytes(
            tmp_path / name / "metrics.jsonl",
            f'{{"step": 1, "loss": 2.5}}\n{{"step": 2, "loss": {second}}}\n'.encode(),
        )
        checkpoints = Checkpointer(str(tmp_path / name), {})
        checkpoints.save(2, {"model": {"w": torch.ones(1)}})
        checkpoints.join()
    kills = [verdict.Kill(Fault(1), 1, 0, 3.5), verdict.Kill(Fault(2, target="driver"), 2, 1, 4.0)]
    uris = str(tmp_path / "uninterrupted"), str(tmp_path / "killed")
    compared = verdict.compare_runs(*uris, kills, 0)
    assert not compared.equal
    assert compared.largest_difference == pytest.approx(0.1)
    assert [kill.recovery_s for kill in compared.kills] == [3.5, 4.0]
    assert compared.first_difference == (
        "loss at step 2: 2.4 uninterrupted, 2.3 killed (after the kill of the driver during step "
        "2, resumed from step 1)"
    )
    assert verdict.compare_runs(*uris, kills, 0.1).equal


def test_kill_that_did_not_happen_and_runs_without_metrics_prove_nothing(
    tmp_path: Path,
) -> None:
    storage.write_json(
        faults.record_uri(str(tmp_path), 0),
        {"step": 2, "time": 1.0, "recovered": 3.0, "resumed_from": 0},
    )
    with pytest.raises(
        verdict.Unproven, match=r"the kill of the driver during step 5 did not happen"
    ):
        verdict.kills_of(str(tmp_path), [Fault(2), Fault(5, target="driver")])
    storage.write_bytes(tmp_path / "metrics.jsonl", b"")
    with pytest.raises(verdict.Unproven, match=r"has 0 metrics and 0 tensors to compare"):
        verdict.compare_runs(str(tmp_path), str(tmp_path), [], 0)


# ---- plans


def test_kills_are_planned_between_checkpoints() -> None:
    config = verify.shortened(loader.load("gpt", "gpt-tiny", {"parallel.workers": 2}), 24)
    assert (config.steps, config.checkpoint.every) == (24, 6)
    assert verify.plan_kills(["worker", "upload", "driver"], config) == [
        Fault(15, rank=1),
        Fault(12, "upload"),
        Fault(21, target="driver"),
    ]
    draws = verify.plan_kills(["random"] * 50, config, seed=1)
    assert draws == verify.plan_kills(["random"] * 50, config, seed=1)
    assert {fault.rank for fault in draws} == {0, 1}
    assert len({fault.delay for fault in draws}) == 50
    assert all(1 < fault.step < 23 for fault in draws)


def test_invalid_plan_is_an_error_before_any_run(tmp_path: Path) -> None:
    config = loader.load("gpt", "gpt-tiny")
    unknown: Any = "lunch"
    for plan, message in {
        (): "no kill is planned",
        (Fault(21),): "planned at step 21, and the run has steps 1 to 20",
        (Fault(2, rank=1),): "worker 1 is to be killed, and parallel.workers is 1",
        (Fault(2, unknown),): "has an unknown moment or target",
    }.items():
        with pytest.raises(ValueError, match=message):
            verify.verify(config, str(tmp_path), list(plan))
    with pytest.raises(ValueError, match=r"run calm in .* has completed 0 steps"):
        verify.verify(config, str(tmp_path), [Fault(2)], uninterrupted="calm")
    command = ["verify-resume", "gpt", "--config", "gpt-tiny", "--storage", str(tmp_path)]
    for words, message in {
        ("--steps", "4"): "--steps is 4: 8 or more",
        ("--kills", "worker,drivr"): "there is no kill 'drivr', did you mean driver",
        ("--optim.lrr", "1"): "there is no option --optim.lrr, did you mean optim.lr",
    }.items():
        with pytest.raises(ValueError, match=message):
            train.main([*command, *words])
    assert not storage.names(tmp_path)


def test_error_of_a_driver_is_the_error_of_the_command(kiln: str) -> None:
    config = config_of(kiln, **{"data.source": f"{kiln}/nowhere.txt"})
    with pytest.raises(ValueError, match=r"^data.source: there are no files at .*nowhere.txt"):
        verify.verify(config, kiln, [Fault(2)])
