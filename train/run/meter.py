"""Training speed, and the seconds that training waited for something."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds that a training loop's meter counts, by metric, and what they were spent on.
TIMES = {
    "train_s": "training",
    "data_s": "of it waiting for data",
    "eval_s": "evaluation",
    "sample_s": "samples",
    "checkpoint_s": "blocked by checkpoints",
}


class Meter:
    """Measure speed over training alone, without evaluation and samples.

    Args:
        metric: the name of the speed, e.g. "tokens_per_s".
        per_step: how many of its units a step processes.
        flop_per_step: the model's floating-point operations per step, over all workers (see
            `train.run.flops`); 0: unknown.
        peak_flops: the devices' peak, over all workers, in operations per second; 0: unknown.
    """

    def __init__(
        self, metric: str, per_step: int, flop_per_step: float = 0, peak_flops: float = 0
    ) -> None:
        self._metric, self._per_step = metric, per_step
        self._ideal_s = flop_per_step / peak_flops if peak_flops else 0.0  # of a step at the peak
        self._since = time.perf_counter()
        self._seconds, self._steps, self._all_steps = 0.0, 0, 0
        self._waited: dict[str, float] = {}
        self._all_waited: dict[str, float] = {}

    def count(self) -> None:
        """Count one step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the values since the last call: speed, mfu (0 to 1) where both of its parts are
        known, and <name>_s for what was waited for."""
        now = time.perf_counter()
        seconds, steps, waited = now - self._since, self._steps, self._waited
        self._since, self._steps, self._waited = now, 0, {}
        self._seconds, self._all_steps = self._seconds + seconds, self._all_steps + steps
        self._all_waited = _sums(self._all_waited, waited)
        return {**self._speed(steps, seconds), **_in_seconds(waited)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside from training."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the time inside as waiting for `name`."""
        begin = time.perf_counter()
        yield
        self._waited = _sums(self._waited, {name: time.perf_counter() - begin})

    def total(self) -> dict[str, float]:
        """Return totals: speed and mfu over the steps that `read` has covered, train_s (their
        seconds), and <name>_s for each kind of waiting until now."""
        speed = self._speed(self._all_steps, self._seconds) if self._seconds else {}
        train = {"train_s": self._seconds} if self._seconds else {}
        return {**speed, **train, **_in_seconds(_sums(self._all_waited, self._waited))}

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        mfu = {"mfu": steps * self._ideal_s / seconds} if self._ideal_s else {}
        return {self._metric: steps * self._per_step / seconds, **mfu}


def _sums(seconds: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return seconds | {name: seconds.get(name, 0.0) + value for name, value in more.items()}


def _in_seconds(waited: dict[str, float]) -> dict[str, float]:
    return {f"{name}_s": value for name, value in waited.items()}
