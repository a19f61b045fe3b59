"""A search as it runs: on a terminal one live table, elsewhere a line for each result."""

import sys
from typing import Any, ClassVar

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.live import Live
from rich.table import Table


class Progress(Callback):
    """Shows every trial with its values, how far it is, and the metric that decides.

    Args:
        metric: the result that is searched for, the smaller the better.
        keys: the config keys that differ between trials.
        steps: how many a trial runs unless it is stopped early.
    """

    # Of the class: Tune makes its callbacks anew from what it stored with a search, and there is one terminal.
    _live: ClassVar[Live | None] = None

    def __init__(self, metric: str, keys: list[str], steps: int) -> None:
        self._metric, self._keys, self._steps = metric, keys, steps

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if not sys.stdout.isatty():
            values = "  ".join(f"{key} {_short(trial.config[key])}" for key in self._keys)
            print(
                f"{trial}: step {result['step']:.0f}/{self._steps}  {self._metric} {result[self._metric]:.4f}  {values}",
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
        """Gives the terminal back, cursor and all; after Ctrl-C Tune tells its callbacks nothing more."""
        if cls._live is not None:
            cls._live.stop()
            cls._live = None

    def table(self, trials: list[Trial]) -> Table:
        """All trials that have begun, the best so far marked."""
        table = Table(
            "trial",
            "status",
            *self._keys,
            "step",
            self._metric,
            title="Search",
            title_justify="left",
        )
        scores = {
            trial: trial.last_result[self._metric]
            for trial in trials
            if self._metric in (trial.last_result or {})
        }
        best = min(scores, key=scores.__getitem__, default=None)
        for trial in sorted(trials, key=str):
            step = (trial.last_result or {}).get("step", 0)
            score = f"{scores[trial]:.4f}" if trial in scores else ""
            values = [_short(trial.config[key]) for key in self._keys]
            table.add_row(
                str(trial),
                self._status(trial, step),
                *values,
                f"{step:.0f}/{self._steps}",
                score,
                style="bold" if trial is best else None,
            )
        return table

    def _status(self, trial: Trial, step: float) -> str:
        if trial.status == Trial.TERMINATED:
            return "finished" if step >= self._steps else "stopped early"
        return str(trial.status.lower())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
