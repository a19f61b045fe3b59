"""Inception's features, for users who have its weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"


def load(weights: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Return a function from images to Inception's features, as torch-fidelity's FID computes them.

    Args:
        weights: the path of torch-fidelity's file of weights.
        device: where to compute.

    Returns:
        A function from images (B, C, H, W) in [-1, 1] to features (B, 2048).

    Raises:
        ValueError: the file or the package `torch-fidelity` is missing, or the file does not hold
            Inception's weights.
    """
    if not Path(weights).is_file():
        raise ValueError(
            f"quality.inception is {weights}, which is no file: give {WEIGHTS}, or leave it out"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(
            "quality.inception needs torch-fidelity: install it with "
            "`pip install 'raykiln[inception]'`"
        ) from None
    try:
        # Raises for a file that would run code when it is unpickled, which torch-fidelity allows.
        torch.load(weights, weights_only=True)
        net: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3", ["2048"], feature_extractor_weights_path=weights
        ).to(device)
    except Exception as error:  # torch raises many unrelated types for damaged and foreign files
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"quality.inception is {weights}, which does not hold Inception's weights "
            f"({problem}): give {WEIGHTS}, or leave it out"
        ) from None

    def features(images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte()
        (pooled,) = net(pixels.expand(-1, 3, -1, -1))
        assert isinstance(pooled, Tensor)
        return pooled

    return features
