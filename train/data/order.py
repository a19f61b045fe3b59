"""Sample order and random numbers as functions of position.

Nothing here has state: a resumed run, or one with another number of workers, asks for the same
positions and gets the same samples and the same noise.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def rng(*key: int) -> np.random.Generator:
    """Return a generator that depends on `key` alone, e.g. rng(seed, step, purpose, position).

    `SeedSequence` hashes the integers into the key of Philox (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"), so that neighboring keys give independent streams.
    """
    # SeedSequence pads with zeros: without the number of integers, (1, 2) would be (1, 2, 0).
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((len(key), *key))))


class Order:
    """An endless shuffled order of `num_samples` samples; each epoch is another permutation.

    Args:
        num_samples: at least 1.
        seed: of the permutations.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: there must be at least one sample")
        self.num_samples = num_samples
        self.seed = seed

    def samples(self, positions: Indices) -> Indices:
        """Return the sample indices at global positions; both of any one shape."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        found = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            found[inside] = _permutation(self.num_samples, self.seed, int(epoch))[offsets[inside]]
        return found


@lru_cache(maxsize=2)  # a batch can lie in two epochs
def _permutation(num_samples: int, seed: int, epoch: int) -> Indices:
    return rng(seed, epoch).permutation(num_samples)


def positions(
    step: int, global_size: int, micro_size: int, rank: int, world_size: int
) -> list[Indices]:
    """Return this rank's global positions in a step, one array of `micro_size` per micro-batch.

    Micro-batch a of rank r begins at index (a * world_size + r) * micro_size of the global batch.
    Together the ranks read positions step * global_size to (step + 1) * global_size - 1, each once.
    """
    per_micro_batch = world_size * micro_size
    assert global_size % per_micro_batch == 0, (global_size, micro_size, world_size)
    start = step * global_size + rank * micro_size
    return [
        np.arange(start + first, start + first + micro_size)
        for first in range(0, global_size, per_micro_batch)
    ]
