"""What a training loop is given on each worker."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import ray.train

from train.config.sections import Config
from train.data.dataset import Dataset
from train.parallel.strategy import Strategy
from train.run.checkpoint import Checkpointer
from train.run.hooks import Hooks
from train.run.recorder import Recorder

C = TypeVar("C", bound=Config)


@dataclass
class Worker(Generic[C]):
    """One of a run's workers, as its training loop sees it."""

    config: C
    strategy: Strategy
    checkpoints: Checkpointer
    recorder: Recorder
    dataset: Dataset
    hooks: Hooks = field(default_factory=Hooks)

    def measures_at(self, step: int) -> bool:
        """Whether loss and speed are recorded after `step`: also before each evaluation and
        checkpoint, so that NaN is never saved."""
        log, last = self.config.log, step == self.config.steps
        intervals = (log.every, log.eval_every, self.config.checkpoint.every)
        return last or any(step % every == 0 for every in intervals)

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after `step`."""
        return step % self.config.log.eval_every == 0 or step == self.config.steps

    def samples_at(self, step: int) -> bool:
        """Whether samples are drawn after `step`."""
        return step % self.config.log.sample_every == 0 or step == self.config.steps

    def saves_at(self, step: int, evaluated: bool) -> bool:
        """Whether a checkpoint is due after `step`, which was evaluated or not."""
        due = self.config.checkpoint
        regular = step % due.every == 0 or step == self.config.steps
        return regular or (evaluated and due.keep_best > 0)

    def report(self, values: dict[str, float]) -> None:
        """Report metrics to Ray Train, and to a search behind it.

        Every worker must call it: it is a barrier.
        """
        ray.train.report({name: float(value) for name, value in values.items()})
