"""Evaluate generated images against held-out real ones (docs/concepts/quality.md).

A metric by itself says little, so each comes with its baseline: the same metric of as many real
training images. A generator that has learned the distribution reaches the baseline and, but for
chance, nothing better. Only precision and density can exceed it: where variety is missing.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.nets.features import Extractor
from train.data.images import Images
from train.data.order import rng
from train.gan import distances, inception

BATCH = 100  # images at once through generator and extractor
CHOICE = 7  # purpose of a random draw


@dataclass
class ImageFeatures:
    """What the metrics need of N images."""

    features: Tensor  # (N, D) float64
    modes: Tensor  # (N) int64
    projections: Tensor  # (N, NUM_DIRECTIONS)
    inception: Tensor | None  # (N, 2048) float64


class Evaluator:
    """Compute all metrics of a generator, with their baselines.

    The same generator gets the same metrics at each call.

    Args:
        train: the real images of the baseline; the same ones are drawn in every run.
        heldout: the real images to compare with.
        extractor: in eval mode, on `device`.
        samples: how many images to compare, as far as both data sets have them.
        device: where to compute.
        inception_weights: a file with Inception's weights, to compute the FID too.
    """

    def __init__(
        self,
        train: Images,
        heldout: Images,
        extractor: Extractor,
        samples: int,
        device: torch.device | str,
        inception_weights: str | None = None,
    ) -> None:
        self.extractor, self.device = extractor, device
        self.inception = (
            None if inception_weights is None else inception.load(inception_weights, device)
        )
        self.count = min(len(heldout), len(train), samples)
        self.train_batches = self._draw(train)
        self.real = self._features(_centered(heldout, self._draw(heldout)))
        baseline = self._compare(self._features(_centered(train, self.train_batches)))
        del baseline["heldout_kid_spread"]
        self.baseline = {f"{name}_baseline": value for name, value in baseline.items()}

    def __call__(self, generate: Callable[[np.ndarray], Tensor]) -> dict[str, float]:
        """Return the metrics of a generator.

        Args:
            generate: returns images (B, C, H, W) in [-1, 1] in place of the training images with
                the given indices (B). A conditional generator makes them of the same classes, so
                that it differs from the baseline in nothing else.

        Returns:
            heldout_frechet_distance, heldout_kid, ..., each but heldout_kid_spread with its
            baseline, and heldout_samples.
        """
        metrics = self._compare(self._features(map(generate, self.train_batches)))
        return {**metrics, **self.baseline, "heldout_samples": float(self.count)}

    def _draw(self, images: Images) -> list[np.ndarray]:
        """Draw `count` indices at random, since a folder's images are ordered by class; return
        them in batches."""
        chosen = rng(len(images), CHOICE).permutation(len(images))[: self.count]
        return np.array_split(chosen, -(-self.count // BATCH))

    @torch.no_grad()
    def _features(self, batches: Iterable[Tensor]) -> ImageFeatures:
        parts: list[tuple[Tensor, ...]] = []
        for batch in batches:
            images = batch.to(self.device)
            features = self.extractor.features(images)
            modes, projections = self.extractor.modes(features), distances.project(images)
            fid = [] if self.inception is None else [self.inception(images).double()]
            parts.append((features.double(), modes, projections, *fid))
        features, modes, projections, *fid = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        return ImageFeatures(features, modes, projections, fid[0] if fid else None)

    def _compare(self, generated: ImageFeatures) -> dict[str, float]:
        real, config = self.real, self.extractor.config
        features = real.features, generated.features
        kid, kid_spread = distances.kid(*features)
        precision, recall = distances.precision_recall(*features)
        density, coverage = distances.density_coverage(*features)
        num_modes = config.num_modes or config.num_classes
        modes, mode_kl = distances.mode_metrics(real.modes, generated.modes, num_modes)
        metrics: dict[str, float] = {
            "heldout_frechet_distance": distances.frechet_distance(*features),
            "heldout_kid": kid,
            "heldout_kid_spread": kid_spread,
            "heldout_precision": precision,
            "heldout_recall": recall,
            "heldout_density": density,
            "heldout_coverage": coverage,
            "heldout_modes": modes,
            "heldout_mode_kl": mode_kl,
            "heldout_sliced_wasserstein": distances.sliced_wasserstein(
                generated.projections, real.projections
            ),
        }
        if real.inception is not None and generated.inception is not None:
            fid = distances.frechet_distance(real.inception, generated.inception)
            metrics["heldout_fid"] = fid
        return metrics


def _centered(images: Images, batches: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """Yield the images with the given indices, without augmentation."""
    for indices in batches:
        yield torch.from_numpy(images.centered(indices))
