"""The results of a search: how each trial ended, trials.csv, and the best trial."""

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray.tune import Result, ResultGrid

from cluster import storage
from train.config.sections import Values
from train.run import summary


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        run: the name of its run.
        status: finished (it ran all its steps), stopped (early, by the scheduler) or failed.
        step: of its last result; 0 without one.
        score: the metric at that step, smaller is better; None without a result.
        seconds: how long the trial ran.
        values: drawn from the space, by dotted key.
    """

    run: str
    status: Literal["finished", "stopped", "failed"]
    step: int
    score: float | None
    seconds: float
    values: Values


@dataclass(frozen=True)
class Summary:
    """The result of a search.

    Attributes:
        search: its name.
        uri: its folder.
        trials: their number.
        failed: how many of them failed.
        metric: that trials were compared by.
        best: the best trial.
    """

    search: str
    uri: str
    trials: int
    failed: int
    metric: str
    best: Outcome


def outcomes(result_grid: ResultGrid, metric: str, root: str) -> list[Outcome]:
    """Return the outcome of each trial that was started, sorted by the name of its run."""
    found = [_outcome(result_grid[index], metric, root) for index in range(len(result_grid))]
    return sorted(found, key=lambda outcome: outcome.run)


def _outcome(result: Result, metric: str, root: str) -> Outcome:
    """Return the outcome of a trial.

    A finished run's own summary takes precedence over Tune's last result: a short run can end
    before its last results have reached Tune.
    """
    run = run_name(result.path)
    reported = result.metrics or {}
    seconds = round(reported.get("time_total_s", 0.0), 1)
    values = result.config or {}
    done = summary.read(storage.join(root, "runs", run))
    if done and not result.error:
        score = done["metrics"].get(metric)
        return Outcome(run, "finished", done["steps"], score, seconds, values)
    step, score = int(reported.get("step", 0)), reported.get(metric)
    return Outcome(run, "failed" if result.error else "stopped", step, score, seconds, values)


def run_name(trial_folder: str) -> str:
    """Return the name of the run behind a trial's folder.

    Tune appends a suffix where a killed search has left a folder of the same name.
    """
    return re.sub(r"(-\d{5})_\w+$", r"\1", Path(trial_folder).name)


def best(trials: list[Outcome]) -> Outcome | None:
    """Return the trial with the smallest finite score, or None. A diverged run's score is NaN."""
    scores = [
        (trial.score, index)
        for index, trial in enumerate(trials)
        if trial.score is not None and math.isfinite(trial.score)
    ]
    return trials[min(scores)[1]] if scores else None


def to_csv(trials: list[Outcome], metric: str, keys: list[str]) -> str:
    """Return a CSV table: a header and one line per trial."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "status", "step", metric, "seconds", *keys])
    for trial in trials:
        score = "" if trial.score is None else trial.score
        values = [trial.values.get(key, "") for key in keys]
        table.writerow([trial.run, trial.status, trial.step, score, trial.seconds, *values])
    return text.getvalue()
