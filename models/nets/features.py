"""A small image classifier whose features are used to evaluate generated images.

Five convolutions and global pooling. Frechet distance, KID and the other metrics compare its
features of real and of generated images. It is trained once per data set, on real images only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = (32, 64)
MIN_CONFIDENCE = 0.9  # below this probability of its likeliest class, an image is of no mode


@dataclass(frozen=True)
class ExtractorConfig:
    """The sizes of the network."""

    size: int = 32  # pixels per side to which images are resized; one of SIZES
    channels: int = 1  # 1: grayscale, 3: color
    num_classes: int = 10  # that it is trained to classify
    num_modes: int = 0  # clusters of real features, used as modes; 0: the classes are the modes
    width: int = 32  # feature maps of the first convolution

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(
                f"an extractor's size must be one of {', '.join(map(str, SIZES))}: got {self.size}"
            )
        if self.channels not in (1, 3):
            raise ValueError(
                f"an extractor's channels must be 1 (grayscale) or 3 (color): got {self.channels}"
            )
        if min(self.num_classes, self.width) < 1 or self.num_modes < 0:
            raise ValueError(
                "an extractor's num_classes and width must be positive and num_modes at least 0: "
                f"got {self}"
            )

    @property
    def num_features(self) -> int:
        return 2 * self.width


class Extractor(nn.Module):
    """Features and classes of images of any size.

    Evaluate with it in eval mode: there an image does not depend on the other images of its batch.
    Each convolution is followed by BatchNorm (Ioffe & Szegedy 2015,
    https://arxiv.org/abs/1502.03167).
    """

    centroids: Tensor  # (num_modes, D)

    def __init__(self, config: ExtractorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stages = nn.Sequential(
            # The result has 32 pixels per side: 64 are reduced by a wider kernel with stride 2.
            _convolution(config.channels, width, *((3, 1) if config.size == 32 else (5, 2))),
            nn.MaxPool2d(2),
            _convolution(width, 2 * width),
            nn.MaxPool2d(2),
            _convolution(2 * width, 3 * width),
            _convolution(3 * width, 3 * width),
            nn.MaxPool2d(2),
            _convolution(3 * width, config.num_features),
        )
        self.head = nn.Linear(config.num_features, config.num_classes)
        self.register_buffer("centroids", torch.zeros(config.num_modes, config.num_features))

    def features(self, images: Tensor) -> Tensor:
        """Return the means of the last feature maps.

        Args:
            images: (B, channels, H, W) in [-1, 1].

        Returns:
            (B, num_features) float32.
        """
        maps: Tensor = self.stages(self._resized(images.float()))
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, channels, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def modes(self, features: Tensor) -> Tensor:
        """Return the mode of each image.

        It is the nearest cluster or, without clusters, the likeliest class. Most errors of the
        classifier have a low probability; without `MIN_CONFIDENCE` they would make images of one
        class count as several modes.

        Args:
            features: (B, num_features).

        Returns:
            (B) int64; -1 where no class reaches `MIN_CONFIDENCE`.
        """
        if self.config.num_modes:
            return torch.cdist(features, self.centroids).argmin(dim=1)
        probability, found = self.head(features).softmax(dim=1).max(dim=1)
        return torch.where(probability >= MIN_CONFIDENCE, found, -1)

    def _resized(self, images: Tensor) -> Tensor:
        """Resize as Pillow does, so that an image prepared at another size keeps its features."""
        size = (self.config.size, self.config.size)
        if images.shape[-2:] == size:
            return images
        return functional.interpolate(
            images, size, mode="bicubic", antialias=True, align_corners=False
        )


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
