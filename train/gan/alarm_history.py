"""What the alarms remember of a run: recent measurements, extremes, and alarms still active."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TypedDict

WINDOW = 9
"""Measurements whose medians the rules read: a single batch is too noisy."""
BEGINNING = 24
"""Measurements within which a sound critic separates real from generated images."""
WATCHED = ("critic_loss", "gradient_penalty", "gap", "width")
"""The metrics that rules read. gap is real_score - fake_score, width its absolute value."""


class Gap(TypedDict):
    """The highest median gap, and the lowest one since."""

    peak: float
    peak_step: int
    low: float
    low_step: int


@dataclass
class History:
    """The state of a run's alarms; JSON-compatible."""

    measurements: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)
    """The last `WINDOW` values of each metric in `WATCHED`."""
    gap: Gap | None = None
    early_width: float = 0.0
    """The largest median width of the first `BEGINNING` measurements."""
    best: dict[str, list[float]] = field(default_factory=dict)
    """For each evaluated metric its best value and the step of it."""
    active: dict[str, int] = field(default_factory=dict)
    """For each alarm that has not ended the number of calm readings in a row."""

    @property
    def past_beginning(self) -> bool:
        """Whether `BEGINNING` measurements have been made, this one included."""
        return self.measurements >= BEGINNING

    def add(self, step: int, metrics: Mapping[str, float]) -> dict[str, float] | None:
        """Add a measurement.

        Returns:
            The medians of the watched metrics over the last `WINDOW` measurements, or None where
            there are fewer.
        """
        self.measurements += 1
        gap = metrics["real_score"] - metrics["fake_score"]
        for name, value in {**metrics, "gap": gap, "width": abs(gap)}.items():
            if name in WATCHED:
                self.recent[name] = [*self.recent.get(name, []), value][-WINDOW:]
        if self.measurements < WINDOW:
            return None
        medians = {name: median(values) for name, values in self.recent.items()}
        self._update_gap(step, medians["gap"])
        if self.measurements <= BEGINNING:
            self.early_width = max(self.early_width, medians["width"])
        return medians

    def _update_gap(self, step: int, gap: float) -> None:
        if self.gap is None or (gap > self.gap["peak"] and self._peak_may_move(self.gap)):
            self.gap = {"peak": gap, "peak_step": step, "low": gap, "low_step": step}
        elif gap < self.gap["low"]:
            self.gap |= {"low": gap, "low_step": step}

    def _peak_may_move(self, gap: Gap) -> bool:
        """Return False once the gap has halved: a later rise past the peak is a failure."""
        return self.measurements <= BEGINNING or gap["low"] > gap["peak"] / 2

    def update_best(
        self, name: str, value: float, step: int, smaller_is_better: bool = False
    ) -> tuple[float, int]:
        """Return the best value of an evaluated metric, this one included, and its step."""
        best = self.best.get(name)
        if best is None or (value < best[0] if smaller_is_better else value > best[0]):
            self.best[name] = [value, step]
        best_value, best_step = self.best[name]
        return best_value, int(best_step)
