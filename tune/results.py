"""What a search's trials came to: trials.csv, and which of them was best."""

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray.tune import ResultGrid

from cluster import storage


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        run: the name of its run.
        status: finished (it ran all its steps), stopped (early, as one of the worse half) or failed.
        step: of its last result; 0 without one.
        score: the metric then, the smaller the better; None without a result.
        values: what was drawn for it, {dotted key: value}.
    """

    run: str
    status: Literal["finished", "stopped", "failed"]
    step: int
    score: float | None
    seconds: float
    values: dict[str, Any]


def outcomes(grid: ResultGrid, metric: str, root: str) -> list[Outcome]:
    """One per trial that began, by its run's name.

    A finished run's own summary counts, not what Tune heard last: a run that ends quickly can be gone before its last
    results have come through.
    """
    found = []
    for number in range(len(grid)):
        result = grid[number]
        run = run_of(result.path)
        heard, seconds = (
            result.metrics or {},
            round((result.metrics or {}).get("time_total_s", 0.0), 1),
        )
        complete = summary(root, run)
        if complete and not result.error:
            found.append(
                Outcome(
                    run,
                    "finished",
                    complete["steps"],
                    complete["metrics"].get(metric),
                    seconds,
                    result.config or {},
                )
            )
        else:
            status: Literal["failed", "stopped"] = "failed" if result.error else "stopped"
            found.append(
                Outcome(
                    run,
                    status,
                    int(heard.get("step", 0)),
                    heard.get(metric),
                    seconds,
                    result.config or {},
                )
            )
    return sorted(found, key=lambda outcome: outcome.run)


def run_of(trial_folder: str) -> str:
    """The run behind a trial's folder; Tune adds a suffix where a killed search has left one of that name."""
    return re.sub(r"(-\d{5})_\w+$", r"\1", Path(trial_folder).name)


def summary(root: str, run: str) -> dict[str, Any] | None:
    """What a run that came to its end wrote about itself, None for one that did not."""
    uri = storage.join(root, "runs", run, "summary.json")
    return dict(storage.read_json(uri)) if storage.exists(uri) else None


def best(trials: list[Outcome]) -> Outcome | None:
    """The one with the smallest finite score, None where there is none (a diverged run's is NaN)."""
    judged = [
        (trial.score, number)
        for number, trial in enumerate(trials)
        if trial.score is not None and math.isfinite(trial.score)
    ]
    return trials[min(judged)[1]] if judged else None


def to_csv(trials: list[Outcome], metric: str, keys: list[str]) -> str:
    """A header and one line per trial."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "status", "step", metric, "seconds", *keys])
    for trial in trials:
        score = "" if trial.score is None else trial.score
        table.writerow(
            [
                trial.run,
                trial.status,
                trial.step,
                score,
                trial.seconds,
                *(trial.values.get(key, "") for key in keys),
            ]
        )
    return text.getvalue()
