"""The exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.parallel.state import State
from train.parallel.strategy import Learner


class Average:
    """The moving average of a learner's weights, sharded like them, and of its running statistics
    (BatchNorm's).

    The decay is smaller at first (TensorFlow's `num_updates` rule), so that the average soon
    leaves the initial weights behind.

    Args:
        learner: whose weights are averaged.
        decay: of the average, 0 to 1.
        saved: the state of the checkpoint to resume from.
    """

    def __init__(self, learner: Learner, decay: float, saved: State | None = None) -> None:
        self.learner, self.decay, self.part = learner, decay, f"{learner.name}_ema"
        self.values = {name: value.clone() for name, value in learner.local().items()}
        self.buffers = {
            name: value.clone()
            for name, value in learner.model.named_buffers()
            if value.is_floating_point()
        }
        if saved is not None:
            self.restore(saved)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, average in self._pairs():
            average.lerp_(value, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights inside the context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for value, average in self._pairs():
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each of the learner's tensors with its average."""
        for name, value in self.learner.local().items():
            yield value, self.values[name]
        for name, average in self.buffers.items():
            yield self.learner.model.get_buffer(name), average

    def state(self) -> State:
        """Return the average's part of a checkpoint."""
        return {self.part: self.learner.as_shards(self.values) | self.buffers}

    def restore(self, saved: State) -> None:
        """Load what `state` returned."""
        for name, value in self.values.items():
            value.copy_(self.learner.local_part(name, saved[self.part][name]))
        for name, value in self.buffers.items():
            value.copy_(saved[self.part][name])
