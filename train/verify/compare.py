"""Compare two runs bit for bit: every metric of every step, every tensor of every checkpoint."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from train.parallel.state import State
from train.run import checkpoint

_MISSING = object()  # not None, which a state may hold


@dataclass(frozen=True)
class Compared:
    """A metric or tensor of two runs."""

    step: int
    what: str
    difference: str = ""
    """In words; "" where they are equal bit for bit."""
    absolute: float = 0.0
    """The largest absolute difference."""
    relative: float = 0.0
    """The same, relative to the largest magnitude in the uninterrupted run."""

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most a relative tolerance; 0: bit for bit."""
        return not self.difference or (tolerance > 0 and self.relative <= tolerance)


def metrics(
    uninterrupted: list[dict[str, float]], killed: list[dict[str, float]]
) -> Iterator[Compared]:
    """Compare the metrics in the rows of two metrics.jsonl, without those that depend on the
    clock, step by step."""
    one, other = _without_clock(uninterrupted), _without_clock(killed)
    for step, metric in sorted(one.keys() | other.keys()):
        what = f"{metric} at step {step}"
        key = step, metric
        yield _compare(step, what, one.get(key, _MISSING), other.get(key, _MISSING))


def _without_clock(rows: list[dict[str, float]]) -> dict[tuple[int, str], float]:
    """Return {(step, metric): value}, without what depends on the clock."""
    excluded = {"step", "time", "mfu"}
    return {
        (int(row["step"]), metric): value
        for row in rows
        for metric, value in row.items()
        if metric not in excluded and not metric.endswith("_s")
    }


def checkpoints(uninterrupted_uri: str, killed_uri: str) -> Iterator[Compared]:
    """Compare all that the checkpoints of two runs hold."""
    one, other = (
        {manifest.step: manifest for manifest in checkpoint.complete(uri)}
        for uri in (uninterrupted_uri, killed_uri)
    )
    for step in sorted(one.keys() | other.keys()):
        if step in one and step in other:
            yield from states(
                step,
                checkpoint.read(uninterrupted_uri, one[step]),
                checkpoint.read(killed_uri, other[step]),
            )
        else:
            yield _missing(step, f"the checkpoint of step {step}", step in one)


def states(step: int, uninterrupted: State, killed: State) -> Iterator[Compared]:
    """Compare all that two checkpoints of a step hold, part by part and name by name."""
    for part in sorted(uninterrupted.keys() | killed.keys()):
        one, other = uninterrupted.get(part, {}), killed.get(part, {})
        for name in sorted(set(one) | set(other)):
            what = f"{part} {name} in the checkpoint of step {step}"
            yield _compare(step, what, one.get(name, _MISSING), other.get(name, _MISSING))


def _compare(step: int, what: str, one: object, other: object) -> Compared:
    """Compare two tensors, numbers or other values (a scaler's state, null)."""
    if one is _MISSING or other is _MISSING:
        return _missing(step, what, other is _MISSING)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return _compare_tensors(step, what, one, other)
    if repr(one) == repr(other):  # which shows every bit of a float
        return Compared(step, what)
    words = f"{one!r} uninterrupted, {other!r} killed"
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return Compared(step, what, words, math.inf, math.inf)
    return Compared(step, what, words, *_sizes(abs(one - other), abs(one)))


def _compare_tensors(step: int, what: str, one: torch.Tensor, other: torch.Tensor) -> Compared:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        words = f"{_type_of(one)} uninterrupted, {_type_of(other)} killed"
        return Compared(step, what, words, math.inf, math.inf)
    if torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other))):
        return Compared(step, what)
    largest = float((one.double() - other.double()).abs().max())
    absolute, relative = _sizes(largest, float(one.double().abs().max()))
    return Compared(step, what, f"differs by up to {absolute:.1e}", absolute, relative)


def _type_of(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _sizes(absolute: float, magnitude: float) -> tuple[float, float]:
    """Return the absolute and the relative size of a difference; infinite where it is NaN."""
    if math.isnan(absolute):
        return math.inf, math.inf
    if magnitude:
        return absolute, absolute / magnitude
    return absolute, math.inf if absolute else 0.0


def _missing(step: int, what: str, in_uninterrupted: bool) -> Compared:
    where = "uninterrupted" if in_uninterrupted else "killed"
    return Compared(step, what, f"only in the {where} run", math.inf, math.inf)
