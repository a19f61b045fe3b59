"""The exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.parallel.state import State
from train.parallel.strategy import Learner


class Average:
    """The moving average of a learner's weights, spread like them, and of its running statistics (BatchNorm's), which belong to them.

    It forgets faster at first (TensorFlow's `num_updates` rule), so that it is not held back by the initial weights.
    """

    def __init__(self, learner: Learner, decay: float, saved: State | None = None) -> None:
        self.learner, self.decay, self.part = learner, decay, f"{learner.name}_ema"
        self.values = {name: value.clone() for name, value in learner.local().items()}
        self.buffers = {
            name: value.clone()
            for name, value in learner.core.named_buffers()
            if value.is_floating_point()
        }
        if saved is not None:
            self.restore(saved)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, average in self._pairs():
            average.lerp_(value, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
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
        """Each of the learner's tensors and its average."""
        for name, value in self.learner.local().items():
            yield value, self.values[name]
        for name, average in self.buffers.items():
            yield self.learner.core.get_buffer(name), average

    def state(self) -> State:
        return {self.part: self.learner.as_shards(self.values) | self.buffers}

    def restore(self, saved: State) -> None:
        for name, value in self.values.items():
            value.copy_(self.learner.local_part(name, saved[self.part][name]))
        for name, value in self.buffers.items():
            value.copy_(saved[self.part][name])
