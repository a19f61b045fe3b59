"""Compare an uninterrupted run with one that was killed, and report the result."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster import storage
from train.run import records
from train.verify import compare, faults
from train.verify.faults import Fault


class Unproven(RuntimeError):
    """A run failed, or was not killed as planned: a comparison would prove nothing.

    The message is one sentence.
    """


@dataclass(frozen=True)
class Kill:
    """A fault that happened, and how the run resumed."""

    fault: Fault
    step: int
    resumed_from: int | None
    """None: no step was left to train."""
    recovery_s: float | None
    """From the kill until the gradients of the next step were ready."""


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison."""

    equal: bool
    """Within the tolerance; a tolerance of 0 is bit for bit."""
    largest_difference: float
    """Absolute, over all metrics and tensors; infinite where one run lacks a value."""
    first_difference: str | None
    """The first one beyond the tolerance, in words."""
    kills: list[Kill]
    metrics: int
    """How many were compared."""
    tensors: int
    uninterrupted: str
    """The runs' names."""
    killed: str


def compare_runs(
    uninterrupted_uri: str, killed_uri: str, kills: list[Kill], tolerance: float
) -> Verdict:
    """Compare two completed runs.

    Raises:
        Unproven: the uninterrupted one recorded nothing to compare.
    """
    rows = records.metrics(uninterrupted_uri), records.metrics(killed_uri)
    metrics = list(compare.metrics(*rows))
    tensors = list(compare.checkpoints(uninterrupted_uri, killed_uri))
    if not metrics or not tensors:
        raise Unproven(
            f"{uninterrupted_uri} has {len(metrics)} metrics and {len(tensors)} tensors to "
            "compare: use a completed run"
        )
    compared = metrics + tensors
    different = sorted(
        (item for item in compared if not item.within(tolerance)), key=lambda item: item.step
    )
    return Verdict(
        equal=not different,
        largest_difference=max(item.absolute for item in compared),
        first_difference=_in_words(different[0], kills) if different else None,
        kills=kills,
        metrics=len(metrics),
        tensors=len(tensors),
        uninterrupted=uninterrupted_uri.rsplit("/", 1)[-1],
        killed=killed_uri.rsplit("/", 1)[-1],
    )


def kills_of(run_uri: str, plan: Sequence[Fault]) -> list[Kill]:
    """Return what became of each planned fault, in the order in which they happened.

    Raises:
        Unproven: a fault did not happen.
    """
    found = []
    for number, fault in enumerate(plan):
        uri = faults.record_uri(run_uri, number)
        if not storage.exists(uri):
            raise Unproven(
                f"the kill of {describe(fault)} did not happen, so nothing is proven; the runs "
                f"are kept, see {run_uri}"
            )
        record = storage.read_json(uri)
        recovery_s = record["recovered"] - record["time"] if "recovered" in record else None
        kill = Kill(fault, record["step"], record.get("resumed_from"), recovery_s)
        found.append((record["time"], kill))
    return [kill for _, kill in sorted(found, key=lambda pair: pair[0])]


def describe(fault: Fault, step: int | None = None) -> str:
    """Describe a kill in words.

    Args:
        fault: the kill.
        step: where it happened; by default where it was planned.
    """
    who = "the driver" if fault.target == "driver" else f"worker {fault.rank}"
    step = step or fault.step
    if fault.moment == "upload":
        return f"{who} during the upload of step {step}'s checkpoint"
    if fault.delay:
        return f"{who} {fault.delay:.2f} of a step after step {step}'s gradients"
    return f"{who} during step {step}"


def table(verdict: Verdict, steps: int, tolerance: float = 0.0) -> str:
    """Return the kills as a table, and the result below it."""
    rows = [("kill -9 of", "resumed from", "seconds to the next step")]
    for kill in verdict.kills:
        if kill.resumed_from is None:
            resumed = ("its end", "-")
        else:
            resumed = (f"step {kill.resumed_from}", f"{kill.recovery_s:.1f}")
        rows.append((describe(kill.fault, kill.step), *resumed))
    width = max(len(row[0]) for row in rows)
    lines = [f"{who:<{width}}  {where:<12}  {seconds}" for who, where, seconds in rows]
    compared = (
        f"{steps} steps, {len(verdict.kills)} kills, {verdict.metrics} metrics and "
        f"{verdict.tensors} tensors"
    )
    largest = f"the largest difference is {verdict.largest_difference:.1e}"
    if not verdict.equal:
        kept = f"the runs are kept: {verdict.uninterrupted}, {verdict.killed}"
        lines.append(f"different: {verdict.first_difference}")
        lines.append(f"{compared} were compared, {largest}; {kept}")
    elif verdict.largest_difference == 0:
        lines.append(f"equal: {compared}, bit for bit")
    else:
        lines.append(f"equal: {compared} within {tolerance:g}, {largest}")
    return "\n".join(lines)


def _in_words(item: compare.Compared, kills: list[Kill]) -> str:
    """Describe a difference, with the kill after which the run trained that step."""
    before = [
        kill for kill in kills if kill.resumed_from is not None and kill.resumed_from < item.step
    ]
    if not before:
        return f"{item.what}: {item.difference}"
    last = before[-1]
    return (
        f"{item.what}: {item.difference} (after the kill of {describe(last.fault, last.step)}, "
        f"resumed from step {last.resumed_from})"
    )
