"""Two runs compared: every figure of every step, every tensor of every checkpoint, bit for bit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train.parallel.state import State
from train.run import checkpoint


@dataclass(frozen=True)
class Compared:
    """A figure or tensor of two runs."""

    step: int
    what: str
    difference: str = ""  # in words; empty: bit for bit the same
    absolute: float = 0.0
    relative: float = 0.0  # to the largest magnitude in the uninterrupted run's

    def within(self, tolerance: float) -> bool:
        return not self.difference or (tolerance > 0 and self.relative <= tolerance)


def metrics(
    uninterrupted: list[dict[str, float]], killed: list[dict[str, float]]
) -> Iterator[Compared]:
    """Every figure that is mathematics in the rows of two metrics.jsonl, step by step."""
    one, other = _mathematics(uninterrupted), _mathematics(killed)
    for step, tag in sorted(one.keys() | other.keys()):
        yield _compare(step, f"{tag} at step {step}", one.get((step, tag)), other.get((step, tag)))


def _mathematics(rows: list[dict[str, float]]) -> dict[tuple[int, str], float]:
    """{(step, tag): value}, without what depends on the clock."""
    clocks = {"step", "time", "mfu"}
    return {
        (int(row["step"]), tag): value
        for row in rows
        for tag, value in row.items()
        if tag not in clocks and not tag.endswith("_s")
    }


def checkpoints(uninterrupted_uri: str, killed_uri: str) -> Iterator[Compared]:
    """All that the checkpoints of two runs hold."""
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
    """All that two checkpoints of a step hold, part by part and name by name."""
    for part in sorted(uninterrupted.keys() | killed.keys()):
        one, other = uninterrupted.get(part, {}), killed.get(part, {})
        for name in sorted(set(one) | set(other)):
            what = f"{part} {name} in the checkpoint of step {step}"
            yield _compare(step, what, one.get(name), other.get(name))


def _compare(step: int, what: str, one: Any, other: Any) -> Compared:
    """Two tensors, numbers, or other values (a scaler's state); None where a run has none."""
    if one is None or other is None:
        return _missing(step, what, one is not None)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return _compare_tensors(step, what, one, other)
    if repr(one) == repr(other):  # of a float: every bit
        return Compared(step, what)
    words = f"{one!r} uninterrupted, {other!r} killed"
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return Compared(step, what, words, math.inf, math.inf)
    return Compared(step, what, words, *_sizes(abs(one - other), abs(one)))


def _compare_tensors(step: int, what: str, one: torch.Tensor, other: torch.Tensor) -> Compared:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        words = (
            f"{one.dtype} {list(one.shape)} uninterrupted, {other.dtype} {list(other.shape)} killed"
        )
        return Compared(step, what, words, math.inf, math.inf)
    if torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other))):
        return Compared(step, what)
    absolute, relative = _sizes(
        float((one.double() - other.double()).abs().max()), float(one.double().abs().max())
    )
    return Compared(step, what, f"differs by up to {absolute:.1e}", absolute, relative)


def _sizes(absolute: float, magnitude: float) -> tuple[float, float]:
    if math.isnan(absolute):
        return math.inf, math.inf
    return absolute, absolute / magnitude if magnitude else (math.inf if absolute else 0.0)


def _missing(step: int, what: str, in_uninterrupted: bool) -> Compared:
    return Compared(
        step,
        what,
        f"only in the {'uninterrupted' if in_uninterrupted else 'killed'} run",
        math.inf,
        math.inf,
    )
