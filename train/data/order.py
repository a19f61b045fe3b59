"""Which sample comes when, and every other random draw of training: functions of position, not of history.

Nothing here has state. A resumed run, or one with another number of workers, asks for the same positions
and gets the same samples and the same noise.
"""

from functools import lru_cache

import numpy as np


def rng(*key: int) -> np.random.Generator:
    """A generator that depends on `key` alone, e.g. rng(seed, step, purpose, position).

    `SeedSequence` hashes the integers into Philox's key (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"), so neighbouring keys give independent streams. Their number goes in first: it pads with
    zeros, and (1, 2) would be (1, 2, 0).
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((len(key), *key))))


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return rng(seed, epoch).permutation(num_samples)


class Order:
    """An endless shuffled walk over `num_samples` samples, each epoch a permutation of its own."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"there is nothing to order: num_samples is {num_samples}")
        self.num_samples = num_samples
        self.seed = seed

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The sample indices at the global `positions` (any shape, int64)."""
        epochs, places = np.divmod(positions, self.num_samples)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            found[inside] = _permutation(self.num_samples, self.seed, int(epoch))[places[inside]]
        return found


def positions(
    step: int, global_size: int, micro_size: int, rank: int, world_size: int
) -> list[np.ndarray]:
    """This rank's global positions in `step`, one array of `micro_size` per micro-batch.

    Micro-batch a of rank r holds the places [(a * world_size + r) * micro_size, ...) of the step's global
    batch: together the ranks read positions step * global_size ... (step + 1) * global_size - 1, each once.
    """
    share = world_size * micro_size
    assert global_size % share == 0, (global_size, micro_size, world_size)
    start = step * global_size + rank * micro_size
    return [
        np.arange(start + first, start + first + micro_size)
        for first in range(0, global_size, share)
    ]
