"""A generator's latents: of a seed, truncated, and on the way from one to another. NumPy only: training and serving share it."""

from statistics import NormalDist

import numpy as np


def seeded_latents(seed: int, count: int, latent_dim: int) -> np.ndarray:
    """Latents (count, latent_dim) of the first `count` pictures of a seed; each is a function of (seed, its index) alone."""
    # uint64, said aloud: NumPy would make floats of a list with a seed from 2**63 on, and neighbouring seeds the same.
    keys = [np.array([seed, index], np.uint64) for index in range(count)]
    streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    return np.stack([stream.standard_normal(latent_dim, dtype=np.float32) for stream in streams])


def truncated(latents: np.ndarray, threshold: float) -> np.ndarray:
    """Normal latents made those of a normal truncated at -threshold and threshold: less variety, more typical pictures.

    The truncation trick of Brock et al. 2019 (https://arxiv.org/abs/1809.11096, section 3.1). They draw the values beyond the
    threshold anew; here each value keeps its quantile, so that a picture changes gradually with the threshold.

    Args:
        latents: of any shape, standard normal.
        threshold: above 0, in standard deviations.

    Returns:
        float32 of the same shape, none beyond the threshold.
    """
    normal = NormalDist()
    below = normal.cdf(-threshold)
    quantiles = (below + (1 - 2 * below) * normal.cdf(value) for value in latents.ravel().tolist())
    return np.array([normal.inv_cdf(quantile) for quantile in quantiles], np.float32).reshape(
        latents.shape
    )


def slerp(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Between two latents along the great circle, where a straight line would cut through lengths that normal noise never has.

    Shoemake 1985 (https://doi.org/10.1145/325165.325242), White 2016 (https://arxiv.org/abs/1609.04468).

    Args:
        first, second: (..., Z), neither of them zero.
        share: 0 gives the first, 1 the second, to the bit.

    Returns:
        (..., Z); on the straight line where the two point the same way, or opposite ways: no circle, or every circle, is theirs.
    """
    lengths = np.linalg.norm(first, axis=-1, keepdims=True) * np.linalg.norm(
        second, axis=-1, keepdims=True
    )
    angle = np.arccos(np.clip((first * second).sum(axis=-1, keepdims=True) / lengths, -1, 1))
    sine = np.sin(angle)
    straight = sine < 1e-3
    divisor = np.where(straight, 1, sine)
    of_first = np.where(straight, 1 - share, np.sin((1 - share) * angle) / divisor)
    of_second = np.where(straight, share, np.sin(share * angle) / divisor)
    return of_first * first + of_second * second


def walk(first: np.ndarray, second: np.ndarray, steps: int) -> np.ndarray:
    """Points at equal distances from `first` to `second`, (..., Z), both included: (steps, ..., Z); steps is at least 2."""
    return np.stack([slerp(first, second, step / (steps - 1)) for step in range(steps)])
