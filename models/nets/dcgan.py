"""DCGAN for WGAN-GP: a generator and a critic for images of 28 to 128 pixels per side.

The architecture is that of Radford et al. 2015 (https://arxiv.org/abs/1511.06434), with the changes
that a gradient penalty needs (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028): the critic
ends without a sigmoid, and none of its layers mixes images of a batch, since the penalty is defined
for each image alone. Both networks are optionally conditional on a class.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.nets.norm import GlobalBatchNorm

BASE_SIZES = {28: 7, 32: 4, 64: 4, 128: 4}  # image size -> size of the smallest feature map


@dataclass(frozen=True)
class DcganConfig:
    """The sizes and norms of both networks."""

    image_size: int = 32  # pixels per side
    channels: int = 1  # 1: grayscale, 3: color
    latent_dim: int = 128
    width: int = 32  # feature maps at half the image size; doubled with every further halving
    num_classes: int = 0  # 0: unconditional
    norm: str = "group"  # of the generator: group or batch
    critic_norm: str = "none"  # none or layer

    def __post_init__(self) -> None:
        if self.image_size not in BASE_SIZES:
            raise ValueError(
                f"image_size {self.image_size} is not supported: use one of "
                f"{', '.join(map(str, BASE_SIZES))}"
            )
        if self.channels not in (1, 3):
            raise ValueError(
                f"channels {self.channels} is not supported: use 1 (grayscale) or 3 (color)"
            )
        if min(self.latent_dim, self.width) < 1 or self.num_classes < 0:
            raise ValueError(
                f"latent_dim and width must be positive and num_classes at least 0: got {self}"
            )
        if self.norm not in ("group", "batch") or self.critic_norm not in ("none", "layer"):
            raise ValueError(
                f"norm must be group or batch and critic_norm none or layer: got {self}"
            )

    @property
    def base_size(self) -> int:
        return BASE_SIZES[self.image_size]

    @property
    def widths(self) -> list[int]:
        """Feature maps at each scale, from half the image size down to `base_size`."""
        halvings = (self.image_size // self.base_size).bit_length() - 1
        return [self.width * 2**i for i in range(halvings)]


class Generator(nn.Module):
    """Images from latents: transposed convolutions that double the size up to `image_size`.

    With norm "group", GroupNorm with one group replaces the paper's BatchNorm. It normalizes each
    image alone, so that an image does not depend on the other images of its batch, in training or
    in serving. With norm "batch", BatchNorm is over the global batch.

    A conditional generator appends an embedding of the class to the latent (Mirza & Osindero 2014,
    https://arxiv.org/abs/1411.1784).
    """

    def __init__(self, config: DcganConfig) -> None:
        super().__init__()
        self.config = config
        *inner, widest = config.widths
        norm = GlobalBatchNorm if config.norm == "batch" else partial(nn.GroupNorm, 1)
        self.embed = (
            nn.Embedding(config.num_classes, config.latent_dim) if config.num_classes else None
        )
        inputs = config.latent_dim * (2 if self.embed else 1)
        stages: list[nn.Module] = [
            nn.Linear(inputs, widest * config.base_size**2, bias=False),
            nn.Unflatten(1, (widest, config.base_size, config.base_size)),
            norm(widest),
            nn.ReLU(),
        ]
        for width in reversed(inner):
            stages += [
                nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
                norm(width),
                nn.ReLU(),
            ]
        stages += [
            nn.ConvTranspose2d(config.width, config.channels, 4, stride=2, padding=1),
            nn.Tanh(),
        ]
        self.stages = nn.Sequential(*stages)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generate images.

        Args:
            latents: (B, latent_dim), standard normal.
            labels: (B) int64 in [0, num_classes); None for an unconditional generator.

        Returns:
            (B, channels, image_size, image_size) in [-1, 1].
        """
        if self.embed is not None:
            latents = torch.cat([latents, self.embed(labels)], dim=1)  # (B, 2 * latent_dim)
        images: Tensor = self.stages(latents)
        return images


class Critic(nn.Module):
    """An unbounded score per image of how real it looks: strided convolutions.

    With critic_norm "layer", each convolution but the first is followed by LayerNorm over the
    image's features, which Gulrajani et al. recommend in place of BatchNorm.

    A conditional critic adds the inner product of the class embedding and the features to the
    score (projection; Miyato & Koyama 2018, https://arxiv.org/abs/1802.05637).
    """

    def __init__(self, config: DcganConfig) -> None:
        super().__init__()
        self.config = config
        stages: list[nn.Module] = []
        inputs = config.channels
        for width in config.widths:
            stages.append(nn.Conv2d(inputs, width, 4, stride=2, padding=1))
            if config.critic_norm == "layer" and inputs != config.channels:
                stages.append(nn.GroupNorm(1, width))
            stages.append(nn.LeakyReLU(0.2))
            inputs = width
        self.features = nn.Sequential(*stages, nn.Flatten())
        num_features = inputs * config.base_size**2
        self.score = nn.Linear(num_features, 1)
        self.embed = nn.Embedding(config.num_classes, num_features) if config.num_classes else None
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=num_features**-0.5)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Score images.

        Args:
            images: (B, channels, image_size, image_size) in [-1, 1].
            labels: (B) int64 in [0, num_classes); None for an unconditional critic.

        Returns:
            (B).
        """
        features = self.features(images)  # (B, widest * base_size**2)
        scores: Tensor = self.score(features).squeeze(1)
        if self.embed is not None:
            scores = scores + (self.embed(labels) * features).sum(dim=1)
        return scores
