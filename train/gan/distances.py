"""Distances between real and generated images, as functions of their features."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from train.data.order import rng

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
"""KID's random subsets and the most points of each."""
NUM_DIRECTIONS = 512
"""Directions of the sliced Wasserstein distance."""
PRESENT = 1 / 3
"""A mode is present if its fraction of the generated images is at least this part of its fraction
of the real ones.

Measured on real garments: images of one class reach at most 0.19 for another class; a thousand
images of all classes reach at least 0.61 for each (200 draws).
"""
BLOCK = 500  # rows at once of a matrix of distances
DIRECTIONS, SUBSETS = 6, 11  # purposes of random draws, which set their keys apart


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance of two normal distributions fitted to points.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) with means m and unbiased covariances S (Dowson &
    Landau 1982; for images Heusel et al. 2017, https://arxiv.org/abs/1706.08500). With S = R'R of
    the QR decomposition of the centered points, the last trace is the sum of the singular values of
    R1 R2'. So no matrix root is needed, and fewer points than dimensions are allowed.

    Args:
        first: (N, D) float64.
        second: (M, D) float64.

    Returns:
        The distance; NaN where a point is not finite, for which the decomposition would raise.
    """
    if not (first.isfinite().all() and second.isfinite().all()):
        return float("nan")
    means = [points.mean(dim=0) for points in (first, second)]
    roots = [
        torch.linalg.qr(points - mean, mode="r").R / (len(points) - 1) ** 0.5
        for points, mean in zip((first, second), means, strict=True)
    ]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    between_means = (means[0] - means[1]).square().sum()
    return float(between_means + roots[0].square().sum() + roots[1].square().sum() - 2 * overlap)


def kid(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the kernel inception distance: `mmd` over random subsets.

    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401.

    Args:
        first: (N, D) float64.
        second: (M, D) float64.

    Returns:
        Mean and standard deviation over `NUM_SUBSETS` random subsets of `SUBSET_SIZE` points, or of
        half of the points where that is fewer.
    """
    size = min(SUBSET_SIZE, min(len(first), len(second)) // 2)
    draw = rng(len(first), len(second), SUBSETS)
    distances = []
    for _ in range(NUM_SUBSETS):
        of_first = draw.choice(len(first), size, replace=False)
        of_second = draw.choice(len(second), size, replace=False)
        distances.append(mmd(first[of_first], second[of_second]))
    return float(np.mean(distances)), float(np.std(distances))


def mmd(first: Tensor, second: Tensor) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy.

    The kernel is KID's, (x.y / D + 1)^3. Equal distributions have an expected value of 0, so that
    the estimate may be negative (Gretton et al. 2012,
    https://jmlr.org/papers/v13/gretton12a.html).

    Args:
        first: (N, D) float64.
        second: (N, D) float64.
    """
    count, dim = first.shape
    within = []
    for points in (first, second):
        kernel = (points @ points.T / dim + 1) ** 3
        within.append((kernel.sum() - kernel.trace()) / (count * (count - 1)))
    between = ((first @ second.T / dim + 1) ** 3).mean()
    return float(within[0] + within[1] - 2 * between)


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall.

    Precision is the fraction of generated points that lie in the ball of a real one, which reaches
    to its k-th nearest neighbor; recall is the same with real and generated points swapped.
    Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991.

    Args:
        real: (N, D) float64.
        generated: (M, D) float64.
        k: which neighbor the balls reach to.
    """
    return _fraction_within(generated, real, k), _fraction_within(real, generated, k)


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Return density and coverage.

    Density is the mean number of real balls that a generated point lies in, divided by k; coverage
    is the fraction of real balls with a generated point in it. A ball reaches to the k-th nearest
    real neighbor. Naeem et al. 2020, https://arxiv.org/abs/2002.09797.

    Args:
        real: (N, D) float64.
        generated: (M, D) float64.
        k: which neighbor the balls reach to.
    """
    radii = _radii(real, k)
    pairs, covered = 0, 0
    for distances, radius in zip(_distances(real, generated), radii.split(BLOCK), strict=True):
        inside = distances <= radius[:, None]  # (rows, M)
        pairs += int(inside.sum())
        covered += int(inside.any(dim=1).sum())
    return pairs / (k * len(generated)), covered / len(real)


def _fraction_within(points: Tensor, centers: Tensor, k: int) -> float:
    """Return the fraction of points that lie in the ball of at least one center."""
    radii = _radii(centers, k)
    within = (
        int((distances <= radii).any(dim=1).sum()) for distances in _distances(points, centers)
    )
    return sum(within) / len(points)


def _radii(points: Tensor, k: int) -> Tensor:
    """Return the distance (N) from each point (N, D) to its k-th nearest other one."""
    nearest = min(k, len(points) - 1) + 1  # the nearest of all is the point itself
    return torch.cat(
        [distances.kthvalue(nearest, dim=1).values for distances in _distances(points, points)]
    )


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield Euclidean distances (at most BLOCK, M), block by block of the points.

    Matrix products would be faster, but their rounding hides near copies.
    """
    for block in points.split(BLOCK):
        yield torch.cdist(block, others, compute_mode="donot_use_mm_for_euclid_dist")


def mode_metrics(real: Tensor, generated: Tensor, num_modes: int) -> tuple[int, float]:
    """Return the number of modes that are present and the divergence of their fractions.

    A mode is present if its fraction of the generated images is at least `PRESENT` of its fraction
    of the real ones. The divergence is Kullback-Leibler's, of the generated from the real
    fractions, in nats. Images of no mode count as one more mode in it, and one image is added to
    each real count, since some may be 0.

    Args:
        real: (N) int64 in [0, num_modes), -1 for no mode.
        generated: (M), likewise.
        num_modes: the number of modes.
    """
    real_counts, counts = (
        (modes + 1).bincount(minlength=num_modes + 1).double().cpu() for modes in (real, generated)
    )
    fractions, real_fractions = counts / len(generated), real_counts / len(real)
    present = (real_counts > 0) & (fractions >= PRESENT * real_fractions)
    smoothed = (real_counts + 1) / (len(real) + num_modes + 1)
    divergence = torch.special.xlogy(fractions, fractions / smoothed).sum()
    return int(present[1:].sum()), float(divergence)


def sliced_wasserstein(first: Tensor, second: Tensor) -> float:
    """Return the mean Wasserstein-1 distance of the projections of two sets of points.

    In one dimension the distance between sets of equal size is the mean distance of their sorted
    points (Rabin et al. 2011, "Wasserstein barycenter and its application to texture mixing").

    Args:
        first: (N, K), N points projected on K unit directions (see `project`).
        second: (N, K), likewise.

    Returns:
        The distance, in the unit of the points' coordinates.

    Raises:
        ValueError: the sets differ in size.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"sliced Wasserstein compares sets of equal size, not {tuple(first.shape)} with "
            f"{tuple(second.shape)}: draw as many points of each"
        )
    return float((first.sort(dim=0).values - second.sort(dim=0).values).abs().mean())


def project(images: Tensor) -> Tensor:
    """Return the projections (B, `NUM_DIRECTIONS`) of images (B, C, H, W) on unit directions of
    pixel space; the directions depend on C * H * W alone."""
    flat = images.flatten(1).float()
    return flat @ _directions(flat.shape[1]).to(flat.device)


@lru_cache(maxsize=1)
def _directions(dim: int) -> Tensor:
    normal = rng(dim, DIRECTIONS).standard_normal((dim, NUM_DIRECTIONS), dtype=np.float32)
    directions = torch.from_numpy(normal)
    unit: Tensor = directions / directions.norm(dim=0)
    return unit
