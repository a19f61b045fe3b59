"""Progress on the driver's terminal, fed by the workers through an actor.

Nothing is parsed out of log lines, so the workers' own output stays free for warnings.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10  # without a terminal

Row = dict[str, float] | str  # a step's metrics, or a message


@dataclass(frozen=True)
class Shown:
    """What is shown of a step (see `train.kinds.Kind`)."""

    metrics: Sequence[str]
    speed: str


class Feed:
    """The actor between rank 0 and the driver."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def push(self, row: Row) -> None:
        """Add a row."""
        self._rows.append(row)

    def drain(self) -> list[Row]:
        """Return the rows since the last call."""
        rows, self._rows = self._rows, []
        return rows


class DriverHandler(logging.Handler):
    """Send a worker's warnings to the driver's terminal."""

    def __init__(self, feed: "ActorHandle[Feed]") -> None:
        super().__init__(logging.WARNING)
        self._feed = feed

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._feed.push.remote(f"warning: {record.getMessage()}")


@contextmanager
def watch(
    title: str, steps: int, shown: Shown, quiet: bool = False
) -> Iterator["ActorHandle[Feed]"]:
    """Show what is pushed to the feed that it yields: a bar on a terminal, else lines.

    Args:
        title: the run's name.
        steps: the run's number of steps.
        shown: the metrics to show.
        quiet: show nothing (a search has its own table).
    """
    # Ray places actors that need no CPU on any node; on this one, the loss of another node does
    # not end it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    feed: Any = ray.remote(Feed).options(num_cpus=0, scheduling_strategy=here).remote()
    done = threading.Event()
    show_progress = _show_bar if sys.stdout.isatty() else _show_lines
    show = _show_nothing if quiet else show_progress
    screen = threading.Thread(target=show, args=(feed, done, title, steps, shown), daemon=True)
    screen.start()
    try:
        yield feed
    finally:
        done.set()
        screen.join(timeout=5)
        ray.kill(feed)


def _rows(feed: "ActorHandle[Feed]", done: threading.Event) -> Iterator[list[Row]]:
    """Yield batches of rows, twice per second, until the run is over and the feed is empty; end
    without an error when the cluster ends."""
    last = False
    while True:
        try:
            yield ray.get(feed.drain.remote(), timeout=10)
        except ray.exceptions.GetTimeoutError:
            continue  # a busy machine; the feed keeps the rows
        except ray.exceptions.RayError:
            return
        if last:
            return
        last = done.wait(0.5)


def _show_bar(
    feed: "ActorHandle[Feed]", done: threading.Event, title: str, steps: int, shown: Shown
) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task(title, total=steps, metrics="starting")
        for rows in _rows(feed, done):
            for row in rows:
                if isinstance(row, str):
                    progress.console.print(row, markup=False)
                elif any(metric in row for metric in shown.metrics):
                    text = _values(row, shown) + _rate(row, shown.speed)
                    progress.update(task, completed=row["step"], metrics=text)


def _show_lines(
    feed: "ActorHandle[Feed]", done: threading.Event, title: str, steps: int, shown: Shown
) -> None:
    begin, printed = time.monotonic(), 0.0
    first: tuple[float, float] | None = None
    for rows in _rows(feed, done):
        for row in rows:
            if isinstance(row, str):
                print(row, flush=True)
                continue
            first = first or (time.monotonic(), row["step"])
            if time.monotonic() - printed < LINE_EVERY_S and row["step"] < steps:
                continue
            printed = time.monotonic()
            pace = (printed - first[0]) / max(row["step"] - first[1], 1)
            left = f"  {pace * (steps - row['step']):.0f} s left" if row["step"] > first[1] else ""
            metrics = _values(row, shown) + _rate(row, shown.speed)
            seconds = f"{printed - begin:.0f} s"
            print(
                f"{title}: step {row['step']:.0f}/{steps}  {metrics}  {seconds}{left}", flush=True
            )


def _show_nothing(
    feed: "ActorHandle[Feed]", done: threading.Event, title: str, steps: int, shown: Shown
) -> None:
    for _ in _rows(feed, done):
        pass


def _values(row: dict[str, float], shown: Shown) -> str:
    found = (metric for metric in shown.metrics if metric in row)
    return "  ".join(f"{metric} {row[metric]:.4g}" for metric in found)


def _rate(row: dict[str, float], speed: str) -> str:
    if speed not in row:
        return ""
    mfu = f", {row['mfu']:.0%} of the peak" if "mfu" in row else ""
    unit = speed.replace("_per_s", "/s").replace("_", " ")
    return f"  {row[speed]:,.0f} {unit}{mfu}"
