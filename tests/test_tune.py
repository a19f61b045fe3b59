"""A search: what is refused before it starts, what is stopped, what survives a killed driver, and its best config."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import local
from train.config import sections as configs
from tune import launch, results, space
from tune.launch import Plan
from tune.table import Progress

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands start a cluster of their own, beside the session's: what a search must be able to live with."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


def write(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


def rungs(steps: int, tmp_path: Path) -> list[int]:
    scheduler = launch._halving(
        plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path, base={"steps": steps})
    )
    return sorted(int(milestone) for milestone, _ in scheduler._brackets[0]._rungs)


def plan(
    entries: dict[str, Any], tmp_path: Path, kind: str = "gpt", base: dict[str, Any] | None = None
) -> Plan:
    return Plan(kind, base or {}, space.read(write(tmp_path, yaml.safe_dump(entries))), 2, "search")


# Spaces


@pytest.mark.parametrize("preset", sorted(file.stem for file in configs.PRESETS.glob("*.yaml")))
def test_the_shipped_spaces_fit_every_shipped_preset(preset: str) -> None:
    kind = "gan" if preset.startswith("gan") else "gpt"
    base, _ = configs.read(kind, preset)
    assert Plan(kind, base, space.read(kind), 1, "search").steps >= 1


@pytest.mark.parametrize(
    ("entries", "sentence"),
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
            "the bounds 0.2 and 0.1 leave nothing between them",
        ),
        ({"optim.lr": {"loguniform": [0, 0.1]}}, "loguniform's lower bound is 0"),
        (
            {"optim.lr": {"loguniform": ["1e-4", 0.1]}},
            "'1e-4' is text to YAML: write numbers as 1.0e-4",
        ),
        ({"optim.warmup_steps": {"randint": [0.5, 2]}}, "randint takes whole numbers, not 0.5"),
        (
            {"parallel.workers": {"choice": [1, 2]}},
            "give it as --parallel.workers, not in the space",
        ),
        ({"run.name": {"choice": ["a"]}}, "give it as --run.name"),
        ({}, "names no keys to search"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_sentence(
    entries: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        plan(entries, tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["quality.samples", "data.size"])
def test_what_pictures_are_judged_by_is_not_searched(key: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=f"{key} changes what trials are judged by, so they could not be compared: give it as --{key}",
    ):
        plan({key: {"choice": [32, 64]}}, tmp_path, kind="gan")


def test_a_space_that_is_nowhere_names_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"neither a shipped space \(gan, gpt\) nor a file"):
        space.read("gtp")


def test_grids_multiply_and_domains_stay_within_their_bounds(tmp_path: Path) -> None:
    entries = {
        "optim.lr": {"grid": [0.1, 0.2, 0.3]},
        "optim.warmup_steps": {"randint": [3, 5]},
        "optim.clip": {"uniform": [1, 2]},
    }
    searched = plan(entries, tmp_path).space
    assert space.size(searched, 2) == 6
    domains = space.domains(searched)
    assert domains["optim.lr"] == {"grid_search": [0.1, 0.2, 0.3]}
    assert {domains["optim.warmup_steps"].sample() for _ in range(50)} == {3, 4}
    assert searched["optim.warmup_steps"].extremes() == (3, 4)


# Plans


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("parallel", "nodes", "trials"),
    [
        ({"workers": 2}, [node(4)], 2),
        ({"workers": 2}, [node(5)], 2),
        ({"workers": 3}, [node(2)], 0),
        (
            {"workers": 1, "cpus_per_worker": 2},
            [node(3), node(3)],
            2,
        ),  # six CPUs, but a worker is never split
        ({"workers": 1, "cpus_per_worker": 0.5}, [node(2)], 4),
        ({"workers": 2, "gpu": True}, [node(0), node(48, 4), node(48, 4)], 4),
        ({"workers": 1}, [node(4, alive=False)], 0),
    ],
)
def test_as_many_trials_as_whole_runs_fit(
    parallel: dict[str, Any], nodes: list[dict[str, Any]], trials: int
) -> None:
    config = configs.load(
        "gpt", overrides={"batch.global_size": 12, "batch.micro_size": 1, "parallel": parallel}
    )
    assert launch.fitting(config, nodes) == trials


@pytest.mark.parametrize(
    ("nodes", "private", "asked", "trials"),
    [
        ([node(4)], True, None, 4),
        ([node(4)], True, 2, 2),
        ([node(4)], True, 9, 4),
        ([node(4)], False, None, 4),
        ([node(4)], False, 9, 9),  # the cluster may grow
        (
            [node(0)],
            False,
            None,
            1,
        ),  # as in the cloud: the head offers nothing, and workers come when asked for
        ([node(0)], False, 3, 3),
    ],
)
def test_a_search_asks_a_cluster_to_grow_and_a_machine_for_what_it_has(
    nodes: list[dict[str, Any]],
    private: bool,
    asked: int | None,
    trials: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    searched = replace(plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path), max_concurrent=asked)
    assert launch.at_once(searched, nodes, private) == trials
    assert (
        "the cluster has 0 CPUs and 0 GPUs: waiting for nodes to join" in capsys.readouterr().out
    ) == (nodes == [node(0)])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": "a b"}, "run.name is 'a b-00000'"),
        ({"name": "../x"}, "run.name is '../x-00000'"),
        (
            {"max_concurrent": 0},
            "--max-concurrent is 0: a search runs at least one trial at a time",
        ),
    ],
)
def test_a_plan_that_no_run_could_follow_is_refused(
    given: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        replace(plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path), **given)


def test_a_trial_is_a_named_run_judged_often_and_the_best_config_is_not(tmp_path: Path) -> None:
    searched = plan(
        {"optim.lr": {"uniform": [0.1, 0.2]}},
        tmp_path,
        base={"steps": 80, "log": {"eval_every": 80}},
    )
    trial = searched.config({"optim.lr": 0.15}, run="search-00001")
    assert (trial.run.name, trial.log.eval_every, trial.optim.lr) == ("search-00001", 10, 0.15)
    best = searched.config({"optim.lr": 0.15})
    assert (best.run.name, best.log.eval_every, best.optim.lr) == (None, 80, 0.15)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(2, [1]), (4, [1, 2]), (16, [2, 4, 8]), (20, [2, 4, 8, 16]), (800, [100, 200, 400])],
)
def test_halving_leaves_the_last_step_alone(
    steps: int, expected: list[int], tmp_path: Path
) -> None:
    assert rungs(steps, tmp_path) == expected


def test_a_search_of_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps is 1: a search takes at least two"):
        plan({"optim.lr": {"uniform": [0.1, 0.2]}}, tmp_path, base={"steps": 1})


def test_a_trial_that_can_never_fit_is_refused(
    command: Command, private: None, tmp_path: Path
) -> None:
    workers = 2 * (os.cpu_count() or 1)
    answer = command(
        "tune", "gpt", "--config", "gpt-tiny", "--storage", str(tmp_path),
        "--parallel.workers", str(workers), "--batch.global_size", str(workers), "--batch.micro_size", "1",
    )  # fmt: skip
    assert answer.returncode == 2
    assert f"one trial needs {workers} CPUs" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_a_cluster_without_a_dashboard_is_refused(
    command: Command, ray_address: str, tmp_path: Path
) -> None:
    answer = command("tune", "gpt", "--config", "gpt-tiny", "--storage", str(tmp_path))
    assert answer.returncode == 2
    assert "has no dashboard, which frees the workers of stopped trials" in answer.stderr


def test_the_command_refuses_with_the_nearest_key(command: Command) -> None:
    answer = command("tune", "gan", "--gan.critic_step", "3")
    assert answer.returncode == 2
    assert (
        answer.stderr
        == "error: there is no option --gan.critic_step, did you mean gan.critic_steps?\n"
    )


# Results


def outcome(run: str, score: float | None) -> results.Outcome:
    return results.Outcome(run, "finished", 4, score, 1.0, {"optim.lr": 0.1})


def test_the_best_is_the_smallest_number_that_is_one() -> None:
    trials = [outcome("a", float("nan")), outcome("b", None), outcome("c", 2.0), outcome("d", 1.0)]
    found = results.best(trials)
    assert found is not None
    assert found.run == "d"
    assert results.best(trials[:2]) is None


def test_a_trial_s_folder_names_its_run() -> None:
    assert results.run_of("/kiln/searches/s/s-00001") == "s-00001"
    assert results.run_of("/kiln/searches/s/s-00001_6697") == "s-00001"


# The terminal


def test_an_interrupted_search_gives_the_cursor_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    Progress("heldout_bits_per_byte", ["optim.lr"], 20).on_step_end(0, [])
    Progress.stop()
    Progress.stop()
    said = capsys.readouterr().out
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert said.count(hidden) == said.count(shown) == 1
    assert said.index(hidden) < said.index(shown)


# Searches


def rows(search: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((search / "trials.csv").open()))


@pytest.fixture
def one_cpu(
    command: Command, private: None, ray_address: str, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """The environment of a cluster with one logical CPU, beside the session's: two that Ray can see."""
    storage = str(tmp_path / "cluster")
    assert command("cluster", "up", "--storage", storage, "--num-cpus", "1").returncode == 0
    head = local.find(storage)
    assert head is not None
    yield head.variables
    assert command("cluster", "down", "--storage", storage).returncode == 0


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not happened() and time.monotonic() < deadline:
        assert process.poll() is None, "the search ended by itself"
        time.sleep(0.2)
    assert happened()


def test_a_trial_that_is_complete_already_is_compared_by_each_of_its_judgements(
    command: Command, one_cpu: dict[str, str], tmp_path: Path
) -> None:
    shared = [
        "gpt",
        "--config",
        "gpt-tiny",
        "--data.source",
        "docs/guides/training.md",
        "--steps",
        "4",
        "--storage",
        str(tmp_path),
    ]
    trained = command("train", *shared, "--run.name", "r-00000", "--log.eval_every", "1", **one_cpu)
    assert trained.returncode == 0, trained.stderr[-3000:]
    written = (tmp_path / "runs" / "r-00000" / "metrics.jsonl").read_text()

    answer = command(
        "tune",
        *shared,
        "--space",
        write(tmp_path, "optim.lr: {grid: [5.0e-3]}"),
        "--name",
        "r",
        "--num-samples",
        "1",
        **one_cpu,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    told = [
        json.loads(line)
        for line in (tmp_path / "searches" / "r" / "r-00000" / "result.json")
        .read_text()
        .splitlines()
    ]
    judged = [
        row for row in map(json.loads, written.splitlines()) if "heldout_bits_per_byte" in row
    ]
    assert [
        (row["step"], row["heldout_bits_per_byte"])
        for row in told
        if "heldout_bits_per_byte" in row
    ] == [(row["step"], row["heldout_bits_per_byte"]) for row in judged]
    assert len(judged) == 4
    assert (tmp_path / "runs" / "r-00000" / "metrics.jsonl").read_text() == written, (
        "the run was trained again"
    )


def test_a_killed_search_goes_on_and_stopped_trials_free_their_workers(
    command: Command, one_cpu: dict[str, str], tmp_path: Path
) -> None:
    # One trial at a time takes the only CPU: had a stopped one kept its worker, the next would wait for ever.
    grid = write(tmp_path, "optim.lr: {grid: [5.0e-3, 4.0e-3, 1.0e-9, 6.0e-3]}")
    arguments = [
        "gpt", "--config", "gpt-tiny", "--data.source", "docs/guides/training.md", "--steps", "4", "--optim.warmup_steps", "0",
        "--space", grid, "--num-samples", "1", "--name", "s", "--storage", str(tmp_path),
    ]  # fmt: skip
    first = subprocess.Popen(
        [sys.executable, "-m", "tune", *arguments],
        cwd=ROOT,
        env=os.environ | one_cpu | {"TUNE_GLOBAL_CHECKPOINT_S": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (tmp_path / "runs" / "s-00001" / "run.yaml").exists(), first)
        # What Tune has not written down it would run again, and its judgements would then count for the halving.
        wait_for(
            lambda: any(
                "TERMINATED" in state.read_text()
                for state in (tmp_path / "searches" / "s").glob("experiment_state-*")
            ),
            first,
        )
    finally:
        first.kill()
        first.wait()
    done = (tmp_path / "runs" / "s-00000" / "summary.json").stat()
    assert (
        tmp_path / "runs" / "s-00000" / "checkpoints" / "step_000004" / "manifest.json"
    ).exists()

    answer = command("tune", *arguments, "--max-concurrent", "2", **one_cpu)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "search s goes on" in answer.stdout
    assert "--max-concurrent counts only where a search begins" in answer.stdout
    trials = {row["run"]: row["status"] for row in rows(tmp_path / "searches" / "s")}
    assert trials == {
        "s-00000": "finished",
        "s-00001": "finished",
        "s-00002": "stopped",
        "s-00003": "finished",
    }
    assert (
        tmp_path / "runs" / "s-00000" / "summary.json"
    ).stat().st_mtime_ns == done.st_mtime_ns, "a finished trial ran again"

    refused = command("tune", *arguments, "--optim.clip", "2", **one_cpu)
    assert refused.returncode == 2
    assert "search s was begun with another config" in refused.stderr


def test_a_gan_search_ends_in_a_config_that_trains_and_curves_that_compare(
    command: Command, private: None, tmp_path: Path
) -> None:
    answer = command(
        "tune",
        "gan",
        "--config",
        "gan-tiny",
        "--num-samples",
        "2",
        "--name",
        "g",
        "--storage",
        str(tmp_path),
        "--steps",
        "2",
    )
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
