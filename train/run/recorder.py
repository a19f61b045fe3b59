"""What people watch: metrics.jsonl, TensorBoard, samples, Weights & Biases, and the progress bar of the driver.

Rank 0's `Recorder` writes into the run's folder and feeds the driver through a small actor, so that
nothing is parsed out of log lines and the workers' own output stays free for warnings.
"""

import contextlib
import json
import logging
import math
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image
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

from cluster import storage
from train.parallel.state import Halt
from train.run.wandb_mirror import Mirror

logger = logging.getLogger(__name__)

Row = dict[str, float] | str  # measurements of a step, or a sentence to show


class Silent:
    """What the other ranks get: the same verbs, without effect."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, tag: str, picture: np.ndarray) -> None: ...
    def text(self, step: int, tag: str, content: str) -> None: ...
    def alarm(self, step: int, kind: str, sentence: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Recorder(Silent):
    """Writes a run's curves and samples.

    Args:
        run_uri: the run's folder; a remote one is written to at each `flush`.
        start: the step resumed from: what an interrupted run recorded beyond it is dropped.
        feed: the driver's `Feed` actor, or None.
        wandb: for a copy in Weights & Biases: mode ("online" or "offline"), project, name and config of the run.
    """

    def __init__(
        self, run_uri: str, start: int = 0, feed: Any = None, wandb: dict[str, Any] | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        local = storage.local_path(run_uri)
        self._remote = run_uri if local is None else None
        self.folder = local or Path(tempfile.mkdtemp(prefix="raykiln-run-"))
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._feed = feed
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        if self._remote:
            for name in {"metrics.jsonl", "starts.jsonl", "alarms.jsonl"} & set(
                storage.names(self._remote)
            ):
                (self.folder / name).write_bytes(
                    storage.read_bytes(storage.join(self._remote, name))
                )
        self._log = self.folder / "metrics.jsonl"
        kept = (
            [row for row in read(str(self.folder)) if row["step"] <= start]
            if self._log.exists()
            else []
        )
        _write_jsonl(self._log, kept)
        _write_jsonl(
            self.folder / "alarms.jsonl",
            [alarm for alarm in alarms(str(self.folder)) or [] if alarm["step"] <= start],
        )
        begun = [*starts(str(self.folder)), {"time": round(time.time(), 3), "step": start}]
        _write_jsonl(self.folder / "starts.jsonl", begun)
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)
        self._mirror = None
        if wandb:
            # The time tells it from a run that had this name before: W&B would take the one's steps for the other's.
            run_id = f"{wandb['name'][:48]}-{int(begun[0]['time'] * 1000):x}"
            self._mirror = Mirror(run_uri, {**wandb, "id": run_id})
            self._mirror.write_again(kept, start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line in metrics.jsonl, one point a tag in TensorBoard, one row for the progress bar."""
        values, now = {tag: float(value) for tag, value in values.items()}, round(time.time(), 3)
        with self._log.open("a") as file:
            file.write(json.dumps({"step": step, "time": now, **values}) + "\n")
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        if self._mirror is not None:
            self._mirror.scalars(step, now, values)
        if self._feed is not None:
            self._feed.push.remote({"step": step, **values})

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """A picture (H, W, C) uint8 as samples/<tag>_<step>.png and in TensorBoard."""
        drawn = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
        drawn.save(self.folder / "samples" / f"{tag}_{step:06d}.png")
        self._board.add_image(tag, picture, step, dataformats="HWC")
        if self._mirror is not None:
            self._mirror.image(step, tag, drawn)

    def text(self, step: int, tag: str, content: str) -> None:
        """Text as samples/<tag>_<step>.txt and in TensorBoard."""
        (self.folder / "samples" / f"{tag}_{step:06d}.txt").write_text(content, encoding="utf-8")
        self._board.add_text(tag, f"```\n{content}\n```", step)
        if self._mirror is not None:
            self._mirror.text(step, tag, content)
        self.flush()

    def alarm(self, step: int, kind: str, sentence: str) -> None:
        """One line in alarms.jsonl, a text in TensorBoard, a warning on the driver's terminal."""
        with (self.folder / "alarms.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, "sentence": sentence}) + "\n")
        self._board.add_text("alarm", f"**{kind}**: {sentence}", step)
        logger.warning("%s at step %d: %s", kind, step, sentence)

    def flush(self) -> None:
        """What was recorded so far is on the run's storage."""
        self._board.flush()
        if self._remote:
            try:
                storage.upload_changed(self.folder, self._remote, self._uploaded)
            except OSError as problem:  # the curves are not worth a run; a store that is gone will fail the next checkpoint
                logger.warning(
                    "curves and samples could not be written to %s: %s", self._remote, problem
                )

    def close(self) -> None:
        self._board.close()
        if self._mirror is not None:
            self._mirror.close()
        self.flush()
        if self._remote:
            shutil.rmtree(self.folder, ignore_errors=True)


def finite(figures: dict[str, float], step: int) -> dict[str, float]:
    """The figures as they are.

    Raises:
        Halt: one is NaN or infinite: every later checkpoint would be worthless.
    """
    for tag, value in figures.items():
        if not math.isfinite(value):
            raise Halt(
                f"{tag} is {value} at step {step}: training has diverged; start another run with a lower optim.lr"
            )
    return figures


class Meter:
    """Speed over training alone, and what training waited for.

    Args:
        tag: what it is called, e.g. "tokens_per_s".
        per_step: how many of them a step takes.
        flop_per_step: the model's floating-point operations in a step, over all workers (see `train.run.flops`); 0: unknown.
        peak_flops: what all workers' devices together do a second at best; 0: unknown.
    """

    def __init__(
        self, tag: str, per_step: int, flop_per_step: float = 0, peak_flops: float = 0
    ) -> None:
        self._tag, self._per_step = tag, per_step
        self._best_s = (
            flop_per_step / peak_flops if peak_flops else 0.0
        )  # what a step would take at the peak
        self._since = time.perf_counter()
        self._seconds, self._steps, self._all_steps = 0.0, 0, 0
        self._waited: dict[str, float] = {}
        self._all_waited: dict[str, float] = {}

    def count(self) -> None:
        """One step is done."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Since the last reading: speed, mfu (0 to 1) where both halves are known, <name>_s for what was waited for."""
        now = time.perf_counter()
        seconds, steps, waited = now - self._since, self._steps, self._waited
        self._since, self._steps, self._waited = now, 0, {}
        self._seconds, self._all_steps = self._seconds + seconds, self._all_steps + steps
        self._all_waited = _sums(self._all_waited, waited)
        return {**self._speed(steps, seconds), **_in_seconds(waited)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """What happens inside is waited for: counted by its name, in training's time or, where `paused`, beside it."""
        begun = time.perf_counter()
        yield
        self._waited = _sums(self._waited, {name: time.perf_counter() - begun})

    def total(self) -> dict[str, float]:
        """The run's speed and mfu over all readings and their seconds as train_s; <name>_s for all that was waited for till now."""
        speed = (
            {**self._speed(self._all_steps, self._seconds), "train_s": self._seconds}
            if self._seconds
            else {}
        )
        return {**speed, **_in_seconds(_sums(self._all_waited, self._waited))}

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        mfu = {"mfu": steps * self._best_s / seconds} if self._best_s else {}
        return {self._tag: steps * self._per_step / seconds, **mfu}


def _sums(seconds: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return seconds | {name: seconds.get(name, 0.0) + value for name, value in more.items()}


def _in_seconds(waited: dict[str, float]) -> dict[str, float]:
    return {f"{name}_s": value for name, value in waited.items()}


def read(run_uri: str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl."""
    return _jsonl(storage.join(run_uri, "metrics.jsonl"))


def starts(run_uri: str) -> list[dict[str, float]]:
    """When a run was started and from which step, {"time" (Unix, seconds), "step"}: the first is its beginning."""
    place = storage.join(run_uri, "starts.jsonl")
    return _jsonl(place) if storage.exists(place) else []


def alarms(run_uri: str) -> list[dict[str, Any]] | None:
    """What a run was warned of, {"step", "kind", "sentence"}; None where nobody looked: a run of an older version."""
    place = storage.join(run_uri, "alarms.jsonl")
    return _jsonl(place) if storage.exists(place) else None


def _jsonl(place: str) -> list[dict[str, Any]]:
    rows = []
    for line in storage.read_bytes(place).decode().splitlines():
        with contextlib.suppress(
            json.JSONDecodeError
        ):  # the line that a killed process was writing
            rows.append(json.loads(line))
    return rows


def _write_jsonl(place: Path, rows: list[dict[str, Any]]) -> None:
    storage.write_bytes(place, "".join(json.dumps(row) + "\n" for row in rows).encode())


class _Feed:
    """Between rank 0 and the driver."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def push(self, row: Row) -> None:
        self._rows.append(row)

    def drain(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows


class ToDriver(logging.Handler):
    """Shows a worker's warnings on the driver's terminal."""

    def __init__(self, feed: Any) -> None:
        super().__init__(logging.WARNING)
        self._feed = feed

    def emit(self, record: logging.LogRecord) -> None:
        self._feed.push.remote(f"warning: {record.getMessage()}")


@contextmanager
def watch(title: str, steps: int, speed: str, quiet: bool = False) -> Iterator[Any]:
    """Shows what comes through the feed that it yields: a bar on a terminal, else a line every ten seconds.

    Args:
        title: the run's name.
        steps: how many there will be.
        speed: the tag of the figure of speed, e.g. "tokens_per_s".
        quiet: shows nothing (a search has its own table).
    """
    # Ray puts what needs no CPU on any node; here, no other node's death takes it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    feed: Any = ray.remote(_Feed).options(num_cpus=0, scheduling_strategy=here).remote()
    done = threading.Event()
    show = _silence if quiet else _bar if sys.stdout.isatty() else _lines
    screen = threading.Thread(target=show, args=(feed, done, title, steps, speed), daemon=True)
    screen.start()
    try:
        yield feed
    finally:
        done.set()
        screen.join(timeout=5)
        ray.kill(feed)


def _rows(feed: Any, done: threading.Event) -> Iterator[list[Row]]:
    """Batches of rows, twice a second, until the run is over and the feed is empty; ends quietly with the cluster."""
    last = False
    while True:
        try:
            yield ray.get(feed.drain.remote(), timeout=10)
        except ray.exceptions.GetTimeoutError:
            continue  # a busy machine; the rows are kept
        except ray.exceptions.RayError:
            return
        if last:
            return
        last = done.wait(0.5)


def _summary(row: dict[str, float], speed: str) -> str:
    shown = [
        f"{tag} {value:.4g}"
        for tag, value in row.items()
        if tag not in {"step", speed} and ("loss" in tag or "bits" in tag)
    ]
    return "  ".join(shown)


def _rate(row: dict[str, float], speed: str) -> str:
    mfu = f", {row['mfu']:.0%} of the peak" if "mfu" in row else ""
    return (
        f"  {row[speed]:,.0f} {speed.replace('_per_s', '/s').replace('_', ' ')}{mfu}"
        if speed in row
        else ""
    )


def _bar(feed: Any, done: threading.Event, title: str, steps: int, speed: str) -> None:
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]  # fmt: skip
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task(title, total=steps, figures="starting")
        for rows in _rows(feed, done):
            for row in rows:
                if isinstance(row, str):
                    progress.console.print(row, markup=False)
                    continue
                if "loss" in " ".join(row):
                    progress.update(
                        task,
                        completed=row["step"],
                        figures=_summary(row, speed) + _rate(row, speed),
                    )


def _lines(feed: Any, done: threading.Event, title: str, steps: int, speed: str) -> None:
    begun, shown = time.monotonic(), 0.0
    first: tuple[float, float] | None = None
    for rows in _rows(feed, done):
        for row in rows:
            if isinstance(row, str):
                print(row, flush=True)
                continue
            first = first or (time.monotonic(), row["step"])
            if time.monotonic() - shown < 10 and row["step"] < steps:
                continue
            shown = time.monotonic()
            pace = (shown - first[0]) / max(row["step"] - first[1], 1)
            left = f"  {pace * (steps - row['step']):.0f} s left" if row["step"] > first[1] else ""
            print(
                f"{title}: step {row['step']:.0f}/{steps}  {_summary(row, speed)}{_rate(row, speed)}  {shown - begun:.0f} s{left}",
                flush=True,
            )


def _silence(feed: Any, done: threading.Event, title: str, steps: int, speed: str) -> None:
    for _ in _rows(feed, done):
        pass
