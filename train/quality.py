"""How good generated pictures are, without a trained extractor: their sliced Wasserstein distance to held-out ones.

A number by itself says little: it always comes with its floor, the same distance between as many real training
pictures and the held-out ones, which no generator that learned the distribution goes below by more than chance.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from train.images import Pictures
from train.order import rng

NUM_DIRECTIONS = 512
MAX_SAMPLES = 2000
BATCH = 100
DIRECTIONS, CHOICE = 6, 7  # purposes of random draws


def sliced_wasserstein(first: Tensor, second: Tensor) -> float:
    """The mean Wasserstein-1 distance of two point clouds' projections, in the unit of their coordinates.

    In one dimension the distance between two clouds of equal size is that of their sorted points
    (Rabin et al. 2011, "Wasserstein barycenter and its application to texture mixing").

    Args:
        first, second: projections (N, K) of N points each on K unit directions (see `project`).

    Raises:
        ValueError: the clouds differ in size.
    """
    if first.shape != second.shape:
        raise ValueError(f"sliced Wasserstein compares clouds of equal size, not {tuple(first.shape)} with {tuple(second.shape)}")
    return float((first.sort(dim=0).values - second.sort(dim=0).values).abs().mean())


def project(batches: Iterable[Tensor]) -> Tensor:
    """Pictures (B, C, H, W), batch by batch, on `NUM_DIRECTIONS` unit directions of pixel space, always the same: (N, K)."""
    directions = None
    found = []
    for batch in batches:
        flat = batch.flatten(1).float().cpu()
        if directions is None:
            directions = torch.from_numpy(rng(flat.shape[1], DIRECTIONS).standard_normal((flat.shape[1], NUM_DIRECTIONS), dtype=np.float32))
            directions /= directions.norm(dim=0)
        found.append(flat @ directions)
    return torch.cat(found)


def judge(generate: Callable[[np.ndarray], Tensor], train: Pictures, heldout: Pictures) -> dict[str, float]:
    """Generated pictures against the held-out ones, as many as there are (at most `MAX_SAMPLES`).

    Args:
        generate: pictures (B, C, H, W) in [-1, 1] to stand in for the training pictures with the given indices (B):
            a conditional generator makes the classes that those have, so that it and the floor differ in nothing else.
        train: the floor's real pictures, the same ones in every run.
        heldout: what is compared with.

    Returns:
        heldout_sliced_wasserstein, heldout_sliced_wasserstein_floor, heldout_samples.
    """
    count = min(len(heldout), len(train), MAX_SAMPLES)
    # Drawn, not the first ones: a folder's pictures come class by class.
    real, others = (np.array_split(rng(len(side), CHOICE).permutation(len(side))[:count], -(-count // BATCH)) for side in (heldout, train))
    target = project(torch.from_numpy(heldout.centred(part)) for part in real)
    floor = project(torch.from_numpy(train.centred(part)) for part in others)
    made = project(generate(part) for part in others)
    return {
        "heldout_sliced_wasserstein": sliced_wasserstein(made, target),
        "heldout_sliced_wasserstein_floor": sliced_wasserstein(floor, target),
        "heldout_samples": float(count),
    }
