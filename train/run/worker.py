"""What a training loop gets on each worker, and what it asks there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.train

from train.parallel.strategy import Strategy
from train.run import recorder as metrics
from train.run.checkpoint import Checkpointer


@dataclass
class Worker:
    """One of a run's workers, as its loop sees it."""

    config: Any
    strategy: Strategy
    checkpoints: Checkpointer
    recorder: metrics.Silent
    dataset: str
    extractor: str = ""  # a GAN's, by which its pictures are judged (see train/gan/extractor.py)
    reached: Callable[[str, int], None] = lambda moment, step: None  # see train/verify/faults.py

    def measures_at(self, step: int) -> bool:
        """Whether loss and speed are looked at after `step`: also before each judgement and checkpoint, so that NaN is never saved."""
        log, last = self.config.log, step == self.config.steps
        return last or any(
            step % every == 0 for every in (log.every, log.eval_every, self.config.checkpoint.every)
        )

    def saves_at(self, step: int, judged: bool) -> bool:
        """Whether a checkpoint is due after `step`, which was judged on held-out data or not."""
        due = self.config.checkpoint
        return step % due.every == 0 or step == self.config.steps or (judged and due.keep_best > 0)

    def report(self, values: dict[str, float]) -> None:
        """Tells Ray Train (and a search behind it) how the run is doing. Every worker calls it: it is a barrier."""
        ray.train.report({key: float(value) for key, value in values.items()})
