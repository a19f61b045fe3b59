"""A small picture classifier whose features stand for what a picture shows: what generated pictures are judged by.

Five convolutions and global pooling. Frechet distance, KID and the rest compare its features of real and of generated
pictures (train/gan/quality.py); it is trained once for a data set (train/gan/extractor.py), on the real ones alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = (32, 64)
SURE = 0.9  # the probability from which on a picture counts as of its likeliest class


@dataclass(frozen=True)
class ExtractorConfig:
    """The shape of the net; `Extractor(ExtractorConfig(**arguments))` rebuilds one from `dataclasses.asdict`."""

    size: int = (
        32  # pixels a side that the convolutions see, whatever the pictures have; one of SIZES
    )
    channels: int = 1  # 1: grey, 3: colour
    num_classes: int = 10  # what it is trained to tell apart
    num_modes: int = 0  # clusters of real features that stand for the modes; 0: the classes do
    width: int = 32  # feature maps of the first convolution

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(
                f"an extractor's size is one of {', '.join(map(str, SIZES))}, not {self.size}"
            )
        if self.channels not in (1, 3):
            raise ValueError(
                f"an extractor's channels are 1 (grey) or 3 (colour), not {self.channels}"
            )
        if min(self.num_classes, self.width) < 1 or self.num_modes < 0:
            raise ValueError(
                f"an extractor needs at least one class and one feature map, and no negative number of modes, not {self}"
            )

    @property
    def num_features(self) -> int:
        return 2 * self.width


class Extractor(nn.Module):
    """Features and classes of pictures of any size; judge with it in `eval` mode, in which each picture stands alone.

    BatchNorm after each convolution (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167).
    """

    centroids: Tensor  # (num_modes, D)

    def __init__(self, config: ExtractorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stages = nn.Sequential(
            # Every size comes out as 32 pixels: twice as many are looked at by one wider step.
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
        """What the pictures show: the last feature maps' means.

        Args:
            images: (B, channels, H, W) in [-1, 1].

        Returns:
            (B, num_features) float32.
        """
        return self.stages(self._resized(images.float())).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of pictures (B, channels, H, W) in [-1, 1]."""
        return self.head(self.features(images))

    def modes(self, features: Tensor) -> Tensor:
        """The mode that each picture belongs to, (B) int64, from its features (B, num_features).

        With clusters: the nearest. Without: the class, or -1 where the classifier is not sure. Its errors are mostly
        unsure ones, and would else make pictures of one class look like several.
        """
        if self.config.num_modes:
            return torch.cdist(features, self.centroids).argmin(dim=1)
        probability, found = self.head(features).softmax(dim=1).max(dim=1)
        return torch.where(probability >= SURE, found, -1)

    def _resized(self, images: Tensor) -> Tensor:
        """As Pillow resizes, so that a picture prepared at another size keeps its features."""
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
