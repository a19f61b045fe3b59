"""Searches: validation before the start, early stopping, resuming, and the best config."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.search.sample import Domain

from cluster import local
from tests.support import workers
from tests.support.paths import ROOT
from train.config import loader as configs
from train.config.sections import Config
from train.gpt.config import GptConfig
from train.run import summary
from train.run.recorder import RunRecorder
from tune import __main__ as command_line
from tune import launch, resources, results, space
from tune.plan import Plan
from tune.resources import Node
from tune.results import Outcome, Summary
from tune.table import Progress

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands start a cluster of their own, so that the machine has two."""
    without_cluster(monkeypatch)


def without_cluster(patch: pytest.MonkeyPatch) -> None:
    """Remove the session's cluster from the environment."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        patch.delenv(name)


def write(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


def rungs(steps: int, tmp_path: Path) -> list[int]:
    searched = plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path, base={"steps": steps})
    scheduler = launch.scheduler(searched)
    return sorted(int(milestone) for milestone, _ in scheduler._brackets[0]._rungs)


def plan(
    entries: dict[str, Any], tmp_path: Path, kind: str = "gpt", base: dict[str, Any] | None = None
) -> Plan:
    return Plan(kind, base or {}, space.read(write(tmp_path, yaml.safe_dump(entries))), 2, "search")


# Spaces


@pytest.mark.parametrize("preset", sorted(file.stem for file in configs.PRESETS.glob("*.yaml")))
def test_shipped_spaces_fit_every_shipped_preset(preset: str) -> None:
    kind = "gan" if preset.startswith("gan") else "gpt"
    base, _ = configs.read(kind, preset)
    assert Plan(kind, base, space.read(kind), 1, "search").steps >= 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"optim.lrr": {"uniform": [0.1, 0.2]}},
            "search space: there is no key optim.lrr, did you mean optim.lr?",
        ),
        (
            {"optim.lr": {"uniform": [-0.1, 0.2]}},
            "search space, optim.lr: optim.lr is -0.1: Input should be greater than 0",
        ),
        ({"model.layers": {"randint": [0, 3]}}, "model.layers is 0"),
        ({"optim.schedule": {"choice": ["linear", "cosin"]}}, "optim.schedule is 'cosin'"),
        ({"model.heads": {"grid": [2, 5]}}, "model.width is 768, which 5 heads"),
        (
            {"optim.lr": {"normal": [0, 1]}},
            "optim.lr is {'normal': [0, 1]}: write one of loguniform",
        ),
        ({"optim.lr": 0.1}, "optim.lr is 0.1: write one of loguniform"),
        ({"optim.lr": {"uniform": [1]}}, "uniform takes two bounds, not [1]"),
        ({"optim.lr": {"choice": []}}, "choice takes a list of values, not []"),
        (
            {"optim.lr": {"uniform": [0.2, 0.1]}},
            "the bounds are 0.2 and 0.1: the first must be less than the second",
        ),
        ({"optim.lr": {"loguniform": [0, 0.1]}}, "loguniform's lower bound is 0"),
        (
            {"optim.lr": {"loguniform": ["1e-4", 0.1]}},
            "'1e-4' is a string in YAML: write numbers with a decimal point, as in 1.0e-4",
        ),
        ({"optim.warmup_steps": {"randint": [0.5, 2]}}, "randint takes integers, not 0.5"),
        (
            {"parallel.workers": {"choice": [1, 2]}},
            "give it as --parallel.workers, not in the space",
        ),
        ({"run.name": {"choice": ["a"]}}, "run.name is set by the search for each trial: leave"),
        ({"log.eval_every": {"choice": [5]}}, "log.eval_every is set by the search for each"),
        ({"steps": {"choice": [5, 9]}}, "give it as --steps, not in the space"),
        ({}, "has no keys to search"),
    ],
)
def test_invalid_space_is_refused_in_one_sentence(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        plan(entries, tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["quality.samples", "data.size"])
def test_keys_that_change_the_evaluation_are_not_searched(key: str, tmp_path: Path) -> None:
    message = (
        f"{key} changes how trials are evaluated, so they could not be compared: "
        f"give it as --{key}, not in the space"
    )
    with pytest.raises(ValueError, match=message):
        plan({key: {"choice": [32, 64]}}, tmp_path, kind="gan")


def test_unknown_space_names_the_shipped_ones() -> None:
    with pytest.raises(
        ValueError, match=r"--space gtp is neither a shipped space \(gan, gpt\) nor a file"
    ):
        space.read("gtp")


def test_grids_multiply_and_draws_stay_within_bounds(tmp_path: Path) -> None:
    entries = {
        "optim.lr": {"grid": [0.1, 0.2, 0.3]},
        "optim.warmup_steps": {"randint": [3, 5]},
        "optim.clip": {"uniform": [1, 2]},
    }
    searched = plan(entries, tmp_path).space
    assert space.size(searched, 2) == 6
    domains = space.domains(searched)
    assert domains["optim.lr"] == {"grid_search": [0.1, 0.2, 0.3]}
    warmup_steps = domains["optim.warmup_steps"]
    assert isinstance(warmup_steps, Domain)
    assert {warmup_steps.sample() for _ in range(50)} == {3, 4}
    assert searched["optim.warmup_steps"].extremes() == (3, 4)


# Plans


def node(cpus: float, gpus: float = 0, alive: bool = True) -> Node:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("parallel", "nodes", "trials"),
    [
        ({"workers": 2}, [node(4)], 2),
        ({"workers": 2}, [node(5)], 2),
        ({"workers": 3}, [node(2)], 0),
        # Six CPUs, but a worker is never split over two nodes.
        ({"workers": 1, "cpus_per_worker": 2}, [node(3), node(3)], 2),
        ({"workers": 1, "cpus_per_worker": 0.5}, [node(2)], 4),
        ({"workers": 2, "gpu": True}, [node(0), node(48, 4), node(48, 4)], 4),
        ({"workers": 1}, [node(4, alive=False)], 0),
    ],
)
def test_nodes_hold_whole_runs_only(
    parallel: dict[str, Any], nodes: list[Node], trials: int
) -> None:
    config = configs.load(
        "gpt", overrides={"batch.global_size": 12, "batch.micro_size": 1, "parallel": parallel}
    )
    assert resources.fitting_runs(config, nodes) == trials


@pytest.mark.parametrize(
    ("nodes", "private", "max_concurrent", "trials"),
    [
        ([node(4)], True, None, 4),
        ([node(4)], True, 2, 2),
        ([node(4)], True, 9, 4),
        ([node(4)], False, None, 4),
        ([node(4)], False, 9, 9),  # the cluster may grow
        # As in the cloud: the head has no CPUs, and worker nodes join on demand.
        ([node(0)], False, None, 1),
        ([node(0)], False, 3, 3),
    ],
)
def test_only_a_private_cluster_limits_concurrent_trials(
    nodes: list[Node],
    private: bool,
    max_concurrent: int | None,
    trials: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path)
    searched = replace(base, max_concurrent=max_concurrent)
    assert resources.concurrent_trials(searched, nodes, private) == trials
    waits = "the cluster has 0 CPUs and 0 GPUs: waiting for nodes to join"
    assert (waits in capsys.readouterr().out) == (nodes == [node(0)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a b"}, "run.name is 'a b-00000'"),
        ({"name": "../x"}, "run.name is '../x-00000'"),
        ({"max_concurrent": 0}, "--max-concurrent is 0: use at least 1"),
    ],
)
def test_invalid_plan_is_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path), **given)


def test_only_trial_config_has_run_name_and_rung(tmp_path: Path) -> None:
    searched = plan(
        {"optim.lr": {"uniform": [0.1, 0.2]}},
        tmp_path,
        base={"steps": 80, "log": {"eval_every": 80}},
    )
    trial = searched.trial_config("search-00001", {"optim.lr": 0.15})
    assert isinstance(trial, GptConfig)
    assert (trial.run.name, trial.log.eval_every, trial.optim.lr) == ("search-00001", 10, 0.15)
    best = searched.config({"optim.lr": 0.15})
    assert isinstance(best, GptConfig)
    assert (best.run.name, best.log.eval_every, best.optim.lr) == (None, 80, 0.15)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(2, [1]), (4, [1, 2]), (16, [2, 4, 8]), (20, [2, 4, 8, 16]), (800, [100, 200, 400])],
)
def test_no_rung_is_at_the_last_step(steps: int, expected: list[int], tmp_path: Path) -> None:
    assert rungs(steps, tmp_path) == expected


def test_search_of_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps is 1: a search needs at least 2"):
        plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path, base={"steps": 1})


def test_trial_that_never_fits_is_refused(command: Command, private: None, tmp_path: Path) -> None:
    workers = 2 * (os.cpu_count() or 1)
    answer = command(
        "tune", "gpt", "--config", "gpt-tiny", "--storage", str(tmp_path),
        "--parallel.workers", str(workers), "--batch.global_size", str(workers),
        "--batch.micro_size", "1",
    )  # fmt: skip
    assert answer.returncode == 2
    assert f"one trial needs {workers} CPUs" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_cluster_without_dashboard_is_refused(
    command: Command, ray_address: str, tmp_path: Path
) -> None:
    answer = command("tune", "gpt", "--config", "gpt-tiny", "--storage", str(tmp_path))
    assert answer.returncode == 2
    assert "has no dashboard, which frees the workers of stopped trials" in answer.stderr


# The command line


def test_misspelt_key_names_the_nearest(command: Command) -> None:
    answer = command("tune", "gan", "--gan.critic_step", "3")
    assert answer.returncode == 2
    assert (
        answer.stderr
        == "error: there is no option --gan.critic_step, did you mean gan.critic_steps?\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gtp"], "unknown command gtp, did you mean gpt?"),
        (["gpt", "--num-sample", "2"], "there is no option --num-sample"),
        (["gpt", "--num-samples", "two"], "argument --num-samples: invalid int value: 'two'"),
        (["gpt", "--steps"], "argument --steps: expected one argument"),
        (["gpt", "--parallel.static_graph", "1"], "--parallel.static_graph is refused"),
    ],
)
def test_invalid_command_line_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        command_line.main(words)


def test_dry_run_prints_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--name", "s", "--num-samples", "3", "--steps", "20", "--optim.lr=1e-3"]
    assert command_line.main(["gpt", *words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "search": "s",
        "trials": 3,
        "steps": 20,
        "metric": "heldout_bits_per_byte",
        "space": {
            "optim.lr": {"loguniform": [3e-4, 1e-2]},
            "optim.warmup_steps": {"randint": [0, 100]},
        },
    }


def test_json_prints_only_the_summary_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[tuple[Plan, str]] = []

    def search(searched: Plan, root: str) -> Summary:
        plans.append((searched, root))
        print("progress")
        return Summary("s", f"{root}/searches/s", 1, 0, searched.metric, outcome("s-00000", 1.5))

    monkeypatch.setattr(launch, "search", search)
    words = ["--storage", "/kiln", "--name", "s", "--data.source", "a", "--data.source", "b"]
    assert command_line.main(["gpt", *words, "--optim", '{"clip": 2}', "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "search": "s",
        "uri": "/kiln/searches/s",
        "trials": 1,
        "failed": 0,
        "metric": "heldout_bits_per_byte",
        "best": {
            "run": "s-00000",
            "status": "finished",
            "step": 4,
            "score": 1.5,
            "seconds": 1.0,
            "values": {"optim.lr": 0.1},
        },
    }
    assert printed.err == "progress\n"
    [(searched, root)] = plans
    config = searched.config()
    assert isinstance(config, GptConfig)
    assert (root, config.data.source, config.optim.clip) == ("/kiln", ["a", "b"], 2)


# Results


def outcome(run: str, score: float | None) -> Outcome:
    return Outcome(run, "finished", 4, score, 1.0, {"optim.lr": 0.1})


def test_best_trial_has_the_smallest_finite_score() -> None:
    trials = [outcome("a", float("nan")), outcome("b", None), outcome("c", 2.0), outcome("d", 1.0)]
    found = results.best(trials)
    assert found is not None
    assert found.run == "d"
    assert results.best(trials[:2]) is None


def test_trial_folder_names_its_run() -> None:
    assert results.run_name("/kiln/searches/s/s-00001") == "s-00001"
    assert results.run_name("/kiln/searches/s/s-00001_6697") == "s-00001"


# The terminal


def test_stop_shows_the_cursor_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    Progress("heldout_bits_per_byte", ["optim.lr"], 20).on_step_end(0, [])
    Progress.stop()
    Progress.stop()
    printed = capsys.readouterr().out
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert printed.count(hidden) == printed.count(shown) == 1
    assert printed.index(hidden) < printed.index(shown)


# Searches


def rows(search: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((search / "trials.csv").open()))


def scores(lines: str) -> list[tuple[int, float]]:
    """Return step and metric of each JSON line that has the metric."""
    parsed = [json.loads(line) for line in lines.splitlines()]
    metric = "heldout_bits_per_byte"
    return [(row["step"], row[metric]) for row in parsed if metric in row]


@pytest.fixture(scope="module")
def one_cpu(
    command: Command, ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The environment of a cluster with one logical CPU; the session's is a second one."""
    storage = str(tmp_path_factory.mktemp("cluster"))
    with pytest.MonkeyPatch.context() as patch:
        without_cluster(patch)
        assert command("cluster", "up", "--storage", storage, "--num-cpus", "1").returncode == 0
    head = local.find(storage)
    assert head is not None
    yield head.variables
    with pytest.MonkeyPatch.context() as patch:
        without_cluster(patch)
        assert command("cluster", "down", "--storage", storage).returncode == 0


def complete(config: Config, root: Path) -> None:
    """Train a run without Ray, and leave what a search reads of a complete run."""
    uri = str(root / "runs" / str(config.run.name))
    dataset = workers.prepare(config, root)
    recorder = RunRecorder(uri)
    metrics = workers.train(config, dataset, uri, recorder)
    recorder.close()
    summary.write(
        uri,
        {
            "run": str(config.run.name),
            "kind": config.kind,
            "steps": config.steps,
            "workers": 1,
            "seconds": 1.0,
            "dataset": dataset.uri.rsplit("/", 1)[-1],
            "resumed_from": 0,
            "metrics": metrics,
        },
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, "the search ended by itself"
        time.sleep(0.2)
    assert condition()


GRID = "optim.lr: {grid: [5.0e-3, 4.0e-3, 1.0e-9, 6.0e-3]}"
SEARCHED = {
    "data.source": "docs/guides/training.md",
    "steps": 4,
    "optim.warmup_steps": 0,
    "optim.lr": 5e-3,
}


@dataclass(frozen=True)
class Resumed:
    """A search that was killed during its second trial and has completed after its resume."""

    root: Path
    arguments: list[str]
    output: str
    recorded: str
    """The metrics of the first trial's run, which was complete before the search started."""
    completed_ns: int
    """When the summary of that run was written."""


@pytest.fixture(scope="module")
def resumed(
    command: Command, one_cpu: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Resumed:
    # One trial at a time uses the only CPU: if a stopped one kept its worker, the next would hang.
    root = tmp_path_factory.mktemp("kiln")
    arguments = ["gpt", "--config", "gpt-tiny", "--num-samples", "1", "--name", "s"]
    for key in ("data.source", "steps", "optim.warmup_steps"):
        arguments += [f"--{key}", str(SEARCHED[key])]
    arguments += ["--space", write(root, GRID), "--storage", str(root)]
    complete(
        configs.load("gpt", "gpt-tiny", {**SEARCHED, "run.name": "s-00000", "log.eval_every": 1}),
        root,
    )
    first_run = root / "runs" / "s-00000"
    recorded = (first_run / "metrics.jsonl").read_text()
    completed_ns = (first_run / "summary.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        without_cluster(patch)
        first = subprocess.Popen(
            [sys.executable, "-m", "tune", *arguments],
            cwd=ROOT,
            env=os.environ | one_cpu | {"TUNE_GLOBAL_CHECKPOINT_S": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: (root / "runs" / "s-00001" / "run.yaml").exists(), first)
            # Tune runs a trial again unless its end is in the stored state; the scheduler would
            # then count its evaluations.
            wait_for(
                lambda: any(
                    "TERMINATED" in state.read_text()
                    for state in (root / "searches" / "s").glob("experiment_state-*")
                ),
                first,
            )
        finally:
            first.kill()
            first.wait()
        answer = command("tune", *arguments, "--max-concurrent", "2", **one_cpu)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return Resumed(root, arguments, answer.stdout, recorded, completed_ns)


def test_killed_search_resumes_and_stopped_trials_free_their_workers(resumed: Resumed) -> None:
    assert "search s resumes in" in resumed.output
    assert "--max-concurrent applies only to a new search" in resumed.output
    trials = {row["run"]: row["status"] for row in rows(resumed.root / "searches" / "s")}
    assert trials == {
        "s-00000": "finished",
        "s-00001": "finished",
        "s-00002": "stopped",
        "s-00003": "finished",
    }
    for run in ("s-00000", "s-00001"):
        checkpoints = resumed.root / "runs" / run / "checkpoints"
        assert (checkpoints / "step_000004" / "manifest.json").exists()
    summary_file = resumed.root / "runs" / "s-00000" / "summary.json"
    assert summary_file.stat().st_mtime_ns == resumed.completed_ns, "a finished trial ran again"


def test_completed_run_is_not_trained_again_and_reports_each_of_its_evaluations(
    resumed: Resumed,
) -> None:
    reported = (resumed.root / "searches" / "s" / "s-00000" / "result.json").read_text()
    evaluations = scores(resumed.recorded)
    assert scores(reported) == evaluations
    assert len(evaluations) == 4
    written = (resumed.root / "runs" / "s-00000" / "metrics.jsonl").read_text()
    assert written == resumed.recorded, "the run was trained again"


def test_search_with_another_config_is_not_resumed(
    resumed: Resumed, command: Command, private: None, one_cpu: dict[str, str]
) -> None:
    refused = command("tune", *resumed.arguments, "--optim.clip", "2", **one_cpu)
    assert refused.returncode == 2
    assert "search s was started with another config" in refused.stderr


def test_gan_search_writes_a_trainable_config_and_tensorboard_curves(
    command: Command, private: None, tmp_path: Path
) -> None:
    answer = command(
        "tune", "gan", "--config", "gan-tiny", "--num-samples", "2", "--name", "g",
        "--storage", str(tmp_path), "--steps", "2",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    search = tmp_path / "searches" / "g"
    trials = rows(search)
    assert len(trials) == 2
    best = min(trials, key=lambda row: float(row["heldout_frechet_distance"]))
    written = yaml.safe_load((search / "best.yaml").read_text())
    assert written["optim"]["critic_lr"] == float(best["optim.critic_lr"])
    assert written["gan"]["critic_steps"] == int(best["gan.critic_steps"])
    assert (written["run"]["name"], written["steps"]) == (None, 2)
    assert (
        command("train", "gan", "--config", str(search / "best.yaml"), "--dry-run").returncode == 0
    )
    assert f"best: run {best['run']}" in answer.stdout

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(search / best["run"]))
    curves.Reload()
    assert "ray/tune/heldout_frechet_distance" in curves.Tags()["scalars"]
    assert "hparams" in {
        metadata.plugin_data.plugin_name for metadata in curves.summary_metadata.values()
    }
