"""The latents of a generator: from a seed, truncated, interpolated.

NumPy only, since training and serving both use it.
"""

from statistics import NormalDist

import numpy as np


def seeded_latents(seed: int, count: int, latent_dim: int) -> np.ndarray:
    """Return the latents of the first `count` images of a seed.

    Each latent depends on the seed and its own index only, not on `count`.

    Returns:
        (count, latent_dim) float32, standard normal.
    """
    # Explicitly uint64: from 2**63 on NumPy would make the list float, and neighboring seeds equal.
    keys = [np.array([seed, index], np.uint64) for index in range(count)]
    streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    return np.stack([stream.standard_normal(latent_dim, dtype=np.float32) for stream in streams])


def truncated(latents: np.ndarray, threshold: float) -> np.ndarray:
    """Map standard normal latents to a normal distribution truncated at +-threshold.

    The images become less varied and more typical. This is the truncation trick of Brock et al.
    2019 (https://arxiv.org/abs/1809.11096, section 3.1), except that they draw values beyond the
    threshold again: here each value keeps its quantile, so that an image changes gradually with the
    threshold.

    Args:
        latents: of any shape, standard normal.
        threshold: positive, in standard deviations.

    Returns:
        float32 of the same shape, within [-threshold, threshold].
    """
    normal = NormalDist()
    below = normal.cdf(-threshold)
    quantiles = (below + (1 - 2 * below) * normal.cdf(value) for value in latents.ravel().tolist())
    return np.array([normal.inv_cdf(quantile) for quantile in quantiles], np.float32).reshape(
        latents.shape
    )


def slerp(first: np.ndarray, second: np.ndarray, fraction: float) -> np.ndarray:
    """Interpolate spherically between two latents.

    Linear interpolation would pass through lengths that normally distributed latents do not have.
    Shoemake 1985 (https://doi.org/10.1145/325165.325242), White 2016
    (https://arxiv.org/abs/1609.04468).

    Args:
        first, second: (..., Z), not zero.
        fraction: 0 gives exactly `first`, 1 exactly `second`.

    Returns:
        (..., Z). Where the two point in the same or in opposite directions, no single great circle
        connects them and the interpolation is linear.
    """
    lengths = np.linalg.norm(first, axis=-1, keepdims=True) * np.linalg.norm(
        second, axis=-1, keepdims=True
    )
    angle = np.arccos(np.clip((first * second).sum(axis=-1, keepdims=True) / lengths, -1, 1))
    sine = np.sin(angle)
    linear = sine < 1e-3
    divisor = np.where(linear, 1, sine)
    of_first = np.where(linear, 1 - fraction, np.sin((1 - fraction) * angle) / divisor)
    of_second = np.where(linear, fraction, np.sin(fraction * angle) / divisor)
    result: np.ndarray = of_first * first + of_second * second
    return result


def walk(first: np.ndarray, second: np.ndarray, steps: int) -> np.ndarray:
    """Return latents at equal distances from `first` to `second`, both included.

    Args:
        first, second: (..., Z).
        steps: the number of latents; at least 2.

    Returns:
        (steps, ..., Z).
    """
    return np.stack([slerp(first, second, step / (steps - 1)) for step in range(steps)])
