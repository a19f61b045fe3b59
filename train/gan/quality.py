"""How good generated pictures are: against held-out real ones, by what an extractor sees in both (docs/concepts/quality.md).

A number by itself says little: each comes with its floor, the same number for as many real training pictures against
the held-out ones, which no generator that learned the distribution is better than by more than chance; precision and density
are, where variety is missing.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.nets.features import Extractor
from train.data.images import Pictures
from train.data.order import rng

NUM_DIRECTIONS = 512
NUM_SUBSETS, SUBSET_SIZE = 100, 1000  # KID's
# The part of its real share from which on a mode is there. Real garments of one class alone look like at most 0.19 of
# another's share; a thousand of all classes have at least 0.61 of each (200 draws).
PRESENT = 1 / 3
BATCH = 100  # pictures at once through generator and extractor
BLOCK = 500  # rows at once of a matrix of distances
DIRECTIONS, CHOICE, SUBSETS = 6, 7, 11  # purposes of random draws


# ---------------------------------------------------------------- figures of two sets of features


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Frechet distance of two normal distributions with the points' means and (unbiased) covariances.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Dowson & Landau 1982; for pictures Heusel et al. 2017,
    https://arxiv.org/abs/1706.08500). With S = R'R of the centred points' QR decomposition, the last trace is the sum of
    the singular values of R1 R2': no root of a matrix is taken, and it holds for fewer points than dimensions too.

    Args:
        first, second: (N, D) and (M, D) float64.

    Returns:
        NaN where a point is not finite: the singular values would raise.
    """
    if not (first.isfinite().all() and second.isfinite().all()):
        return float("nan")
    means = [points.mean(dim=0) for points in (first, second)]
    roots = [
        torch.linalg.qr(points - mean, mode="r").R / (len(points) - 1) ** 0.5
        for points, mean in zip((first, second), means, strict=True)
    ]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float(
        (means[0] - means[1]).square().sum()
        + roots[0].square().sum()
        + roots[1].square().sum()
        - 2 * overlap
    )


def kid(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The kernel inception distance: squared MMD, unbiased, with the kernel (x.y / D + 1)^3; 0 for equal distributions.

    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401.

    Args:
        first, second: (N, D) and (M, D) float64.

    Returns:
        Mean and standard deviation over `NUM_SUBSETS` random subsets: of `SUBSET_SIZE` points, or of half of them where that is fewer.
    """
    size = min(SUBSET_SIZE, min(len(first), len(second)) // 2)
    draw = rng(len(first), len(second), SUBSETS)
    found = []
    for _ in range(NUM_SUBSETS):
        found.append(
            mmd(
                *(
                    points[draw.choice(len(points), size, replace=False)]
                    for points in (first, second)
                )
            )
        )
    return float(np.mean(found)), float(np.std(found))


def mmd(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of N points each, (N, D), with KID's kernel (Gretton et al. 2012)."""
    count, width = first.shape
    same = []
    for points in (first, second):
        kernel = (points @ points.T / width + 1) ** 3
        same.append((kernel.sum() - kernel.trace()) / (count * (count - 1)))
    return float(same[0] + same[1] - 2 * ((first @ second.T / width + 1) ** 3).mean())


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: the share of made points within a real one's ball, which reaches to its k-th nearest; recall: the other way round.

    Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991.

    Args:
        real, made: (N, D) and (M, D) float64.
    """
    return _share_within(made, real, k), _share_within(real, made, k)


def density_coverage(real: Tensor, made: Tensor, k: int = 5) -> tuple[float, float]:
    """Density: in how many real balls a made point lies, a k-th of their mean number; coverage: the share of real balls with one in it.

    Naeem et al. 2020, https://arxiv.org/abs/2002.09797.

    Args:
        real, made: (N, D) and (M, D) float64.
    """
    radii = _radii(real, k)
    made_within, covered = 0, 0
    for distances, radius in zip(_distances(real, made), radii.split(BLOCK), strict=True):
        inside = distances <= radius[:, None]  # (rows, M)
        made_within += int(inside.sum())
        covered += int(inside.any(dim=1).sum())
    return made_within / (k * len(made)), covered / len(real)


def _share_within(points: Tensor, centres: Tensor, k: int) -> float:
    radii = _radii(centres, k)
    return sum(
        int((distances <= radii).any(dim=1).sum()) for distances in _distances(points, centres)
    ) / len(points)


def _radii(points: Tensor, k: int) -> Tensor:
    """The distance from each point (N, D) to its k-th nearest other one: (N)."""
    nearest = min(k, len(points) - 1) + 1  # the nearest of all is itself
    return torch.cat(
        [distances.kthvalue(nearest, dim=1).values for distances in _distances(points, points)]
    )


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Euclidean distances (at most BLOCK, M), rows in turn; not by matrix products, whose rounding hides near copies."""
    for block in points.split(BLOCK):
        yield torch.cdist(block, others, compute_mode="donot_use_mm_for_euclid_dist")


def mode_figures(real: Tensor, made: Tensor, num_modes: int) -> tuple[int, float]:
    """The number of modes that are there, and the Kullback-Leibler divergence of the made modes' shares from the real ones', in nats.

    A mode is there if its share is at least `PRESENT` of its real share. Pictures of no mode have a share of their own in
    the divergence; one picture is added to each real share, for what has none.

    Args:
        real, made: (N) and (M) int64 in [0, num_modes), -1 for no mode.
    """
    real_counts, made_counts = (
        (modes + 1).bincount(minlength=num_modes + 1).double().cpu() for modes in (real, made)
    )
    shares, real_shares = made_counts / len(made), real_counts / len(real)
    there = (real_counts > 0) & (shares >= PRESENT * real_shares)
    smoothed = (real_counts + 1) / (len(real) + num_modes + 1)
    return int(there[1:].sum()), float(torch.special.xlogy(shares, shares / smoothed).sum())


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
        raise ValueError(
            f"sliced Wasserstein compares clouds of equal size, not {tuple(first.shape)} with {tuple(second.shape)}"
        )
    return float((first.sort(dim=0).values - second.sort(dim=0).values).abs().mean())


def project(images: Tensor) -> Tensor:
    """Pictures (B, C, H, W) on `NUM_DIRECTIONS` unit directions of pixel space, always the same: (B, K)."""
    flat = images.flatten(1).float()
    return flat @ _directions(flat.shape[1]).to(flat.device)


@lru_cache(maxsize=1)
def _directions(dimensions: int) -> Tensor:
    directions = torch.from_numpy(
        rng(dimensions, DIRECTIONS).standard_normal((dimensions, NUM_DIRECTIONS), dtype=np.float32)
    )
    return directions / directions.norm(dim=0)


# ---------------------------------------------------------------- the judge


@dataclass
class Seen:
    """What is kept of some pictures."""

    features: Tensor  # (N, D) float64
    modes: Tensor  # (N) int64
    projections: Tensor  # (N, NUM_DIRECTIONS)
    inception: Tensor | None  # (N, 2048) float64


class Judge:
    """Generated pictures against held-out ones: all figures with their floors, the same at each call for the same generator.

    Args:
        train: the floor's real pictures, the same ones in every run.
        heldout: what is compared with.
        extractor: in eval mode, on `device`.
        samples: how many pictures to compare, as far as either side has them.
        device: where to.
        weights: a file with Inception's, to have the FID too (see `inception`).
    """

    def __init__(
        self,
        train: Pictures,
        heldout: Pictures,
        extractor: Extractor,
        samples: int,
        device: torch.device | str,
        weights: str | None = None,
    ) -> None:
        self.extractor, self.device = extractor, device
        self.inception = None if weights is None else inception(weights, device)
        self.count = min(len(heldout), len(train), samples)
        # Drawn, not the first ones: a folder's pictures come class by class.
        real, self.stand_ins = (
            np.array_split(
                rng(len(side), CHOICE).permutation(len(side))[: self.count], -(-self.count // BATCH)
            )
            for side in (heldout, train)
        )
        self.real = self._see(torch.from_numpy(heldout.centred(part)) for part in real)
        floor = self._compare(
            self._see(torch.from_numpy(train.centred(part)) for part in self.stand_ins)
        )
        self.floor = {
            f"{tag}_floor": value for tag, value in floor.items() if tag != "heldout_kid_spread"
        }

    def __call__(self, generate: Callable[[np.ndarray], Tensor]) -> dict[str, float]:
        """All figures of a generator.

        Args:
            generate: pictures (B, C, H, W) in [-1, 1] to stand in for the training pictures with the given indices (B):
                a conditional generator makes the classes that those have, so that it and the floor differ in nothing else.

        Returns:
            heldout_frechet_distance, heldout_kid, ..., each but heldout_kid_spread with its floor, and heldout_samples.
        """
        found = self._compare(self._see(generate(part) for part in self.stand_ins))
        return {**found, **self.floor, "heldout_samples": float(self.count)}

    @torch.no_grad()
    def _see(self, batches: Iterable[Tensor]) -> Seen:
        parts: list[tuple[Tensor, ...]] = []
        for batch in batches:
            images = batch.to(self.device)
            features = self.extractor.features(images)
            further = [] if self.inception is None else [self.inception(images).double()]
            parts.append(
                (features.double(), self.extractor.modes(features), project(images), *further)
            )
        features, modes, projections, *further = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        return Seen(features, modes, projections, further[0] if further else None)

    def _compare(self, made: Seen) -> dict[str, float]:
        real, config = self.real, self.extractor.config
        figures: dict[str, float] = {
            "heldout_frechet_distance": frechet_distance(real.features, made.features)
        }
        figures["heldout_kid"], figures["heldout_kid_spread"] = kid(real.features, made.features)
        figures["heldout_precision"], figures["heldout_recall"] = precision_recall(
            real.features, made.features
        )
        figures["heldout_density"], figures["heldout_coverage"] = density_coverage(
            real.features, made.features
        )
        figures["heldout_modes"], figures["heldout_mode_kl"] = mode_figures(
            real.modes, made.modes, config.num_modes or config.num_classes
        )
        figures["heldout_sliced_wasserstein"] = sliced_wasserstein(
            made.projections, real.projections
        )
        if real.inception is not None and made.inception is not None:
            figures["heldout_fid"] = frechet_distance(real.inception, made.inception)
        return figures


# ---------------------------------------------------------------- Inception, where the user has its weights


def inception(weights: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Pictures (B, C, H, W) in [-1, 1] to Inception's features (B, 2048), as torch-fidelity computes them for its FID.

    Raises:
        ValueError: the file or the package `torch-fidelity` is missing, or the file holds no tensors, or another net's.
    """
    if not Path(weights).is_file():
        raise ValueError(
            f"quality.inception: there is no file {weights}: give torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or leave it out"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(
            "quality.inception needs torch-fidelity: install it with `pip install 'raykiln[inception]'`"
        ) from None
    try:
        torch.load(
            weights, weights_only=True
        )  # torch-fidelity itself would run whatever code the file holds
        net: Any = FeatureExtractorInceptionV3(
            "inception-v3", ["2048"], feature_extractor_weights_path=weights
        ).to(device)
    except Exception as error:  # torch raises half a dozen unrelated types for damaged files, and for another net's
        raise ValueError(
            f"quality.inception: {weights} does not hold Inception's weights ({str(error).splitlines()[0]}): "
            "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or leave it out"
        ) from None

    def features(images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte()
        return net(pixels.expand(-1, 3, -1, -1))[0]

    return features
