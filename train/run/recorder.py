"""Record a run: metrics.jsonl, TensorBoard, samples, alarms, Weights & Biases."""

import json
import logging
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from cluster import storage
from train.parallel.state import Halt
from train.run import records
from train.run.wandb_mirror import Mirror, Options

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from train.run.progress import Feed

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """What a training loop records."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record metrics of a step."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Record a sample, (H, W, C) uint8."""

    def text(self, step: int, name: str, content: str) -> None:
        """Record a sample of text."""

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Record an alarm and show it on the driver's terminal."""

    def flush(self) -> None:
        """Write what was recorded so far to the run's storage."""

    def close(self) -> None:
        """Flush, and release files and connections."""


class NullRecorder:
    """A `Recorder` that records nothing, for ranks other than 0."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Do nothing."""

    def text(self, step: int, name: str, content: str) -> None:
        """Do nothing."""

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class RunRecorder:
    """The `Recorder` of rank 0, which writes into the run's folder.

    Args:
        run_uri: the run's folder; a remote one is written to at each `flush`.
        start: the step resumed from. What an interrupted run recorded beyond it is dropped.
        feed: the driver's feed actor (see `train.run.progress`), or None.
        wandb: for a copy in Weights & Biases.
    """

    def __init__(
        self,
        run_uri: str,
        start: int = 0,
        feed: "ActorHandle[Feed] | None" = None,
        wandb: Options | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        local = storage.local_path(run_uri)
        self._remote = run_uri if local is None else None
        self.folder = local or Path(tempfile.mkdtemp(prefix="raykiln-run-"))
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._feed = feed
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        if self._remote:
            for name in {records.METRICS, records.STARTS, records.ALARMS} & set(
                storage.names(self._remote)
            ):
                content = storage.read_bytes(storage.join(self._remote, name))
                (self.folder / name).write_bytes(content)
        folder = str(self.folder)
        self._log = self.folder / records.METRICS
        rows = records.metrics(folder) if self._log.exists() else []
        kept = [row for row in rows if row["step"] <= start]
        records.write(self._log, kept)
        alarms = records.alarms(folder) or []
        records.write(
            self.folder / records.ALARMS, [alarm for alarm in alarms if alarm["step"] <= start]
        )
        starts = [*records.starts(folder), {"time": round(time.time(), 3), "step": start}]
        records.write(self.folder / records.STARTS, starts)
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)
        self._mirror = None
        if wandb:
            # The time distinguishes it from an earlier run of this name: W&B would take the steps
            # of one for those of the other.
            run_id = f"{wandb['name'][:48]}-{int(starts[0]['time'] * 1000):x}"
            self._mirror = Mirror(run_uri, wandb, run_id)
            self._mirror.replay(kept, start)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl, a point per metric in TensorBoard, and feed the driver."""
        values = {metric: float(value) for metric, value in values.items()}
        now = round(time.time(), 3)
        with self._log.open("a") as file:
            file.write(json.dumps({"step": step, "time": now, **values}) + "\n")
        for metric, value in values.items():
            self._board.add_scalar(metric, value, step)
        if self._mirror is not None:
            self._mirror.metrics(step, now, values)
        if self._feed is not None:
            self._feed.push.remote({"step": step, **values})

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write samples/<name>_<step>.png, and to TensorBoard."""
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        image.save(self.folder / "samples" / f"{name}_{step:06d}.png")
        self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._mirror is not None:
            self._mirror.image(step, name, image)

    def text(self, step: int, name: str, content: str) -> None:
        """Write samples/<name>_<step>.txt, and to TensorBoard."""
        path = self.folder / "samples" / f"{name}_{step:06d}.txt"
        path.write_text(content, encoding="utf-8")
        self._board.add_text(name, f"```\n{content}\n```", step)
        if self._mirror is not None:
            self._mirror.text(step, name, content)
        self.flush()

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Write a line of alarms.jsonl, a text in TensorBoard, and log a warning."""
        with (self.folder / records.ALARMS).open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, "message": message}) + "\n")
        self._board.add_text("alarm", f"**{kind}**: {message}", step)
        logger.warning("%s at step %d: %s", kind, step, message)

    def flush(self) -> None:
        """Write what was recorded so far to the run's storage."""
        self._board.flush()
        if self._remote:
            try:
                storage.upload_changed(self.folder, self._remote, self._uploaded)
            except OSError as problem:
                # Not worth ending the run: if storage is gone, the next checkpoint fails.
                logger.warning(
                    "curves and samples could not be written to %s: %s", self._remote, problem
                )

    def close(self) -> None:
        """Flush, close TensorBoard and Weights & Biases, and delete the local copy."""
        self._board.close()
        if self._mirror is not None:
            self._mirror.close()
        self.flush()
        if self._remote:
            shutil.rmtree(self.folder, ignore_errors=True)


def check_finite(metrics: dict[str, float], step: int) -> dict[str, float]:
    """Return the metrics.

    Raises:
        Halt: one is NaN or infinite; every later checkpoint would be worthless.
    """
    for metric, value in metrics.items():
        if not math.isfinite(value):
            raise Halt(
                f"{metric} is {value} at step {step}: training has diverged; start another run "
                "with a lower optim.lr"
            )
    return metrics
