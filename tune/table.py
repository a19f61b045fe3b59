"""The progress of a search: a live table on a terminal, elsewhere a line per result."""

import sys
from typing import Any, ClassVar

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.live import Live
from rich.table import Table


class Progress(Callback):
    """A Tune callback that shows every trial with its values, its step and the metric.

    Args:
        metric: that trials are compared by; smaller is better.
        keys: the config keys that differ between trials.
        steps: of a trial that is not stopped early.
    """

    # On the class: Tune creates callbacks again from its stored state, and there is one terminal.
    _live: ClassVar[Live | None] = None

    def __init__(self, metric: str, keys: list[str], steps: int) -> None:
        self._metric, self._keys, self._steps = metric, keys, steps

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if not sys.stdout.isatty():
            values = "  ".join(f"{key} {_short(trial.config[key])}" for key in self._keys)
            print(
                f"{trial}: step {result['step']:.0f}/{self._steps}  "
                f"{self._metric} {result[self._metric]:.4f}  {values}",
                flush=True,
            )

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if not sys.stdout.isatty():
            print(f"{trial}: failed", flush=True)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if not sys.stdout.isatty():
            return
        if Progress._live is None:
            Progress._live = Live(refresh_per_second=2)
            Progress._live.start()
        Progress._live.update(self.table(trials))

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        if Progress._live is not None:
            Progress._live.update(self.table(trials), refresh=True)

    @classmethod
    def stop(cls) -> None:
        """Stop the live table and show the cursor again; Tune calls no callback after Ctrl-C."""
        if cls._live is not None:
            cls._live.stop()
            cls._live = None

    def table(self, trials: list[Trial]) -> Table:
        """Return a table of all trials that were started, the best one in bold."""
        columns = ["trial", "status", *self._keys, "step", self._metric]
        table = Table(*columns, title="Search", title_justify="left")
        scores = {
            trial: trial.last_result[self._metric]
            for trial in trials
            if self._metric in (trial.last_result or {})
        }
        best = min(scores, key=scores.__getitem__, default=None)
        for trial in sorted(trials, key=str):
            step = (trial.last_result or {}).get("step", 0)
            score = f"{scores[trial]:.4f}" if trial in scores else ""
            table.add_row(
                str(trial),
                self._status(trial, step),
                *(_short(trial.config[key]) for key in self._keys),
                f"{step:.0f}/{self._steps}",
                score,
                style="bold" if trial is best else None,
            )
        return table

    def _status(self, trial: Trial, step: float) -> str:
        if trial.status == Trial.TERMINATED:
            return "finished" if step >= self._steps else "stopped early"
        return str(trial.status.lower())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
