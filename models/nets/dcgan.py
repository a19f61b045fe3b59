"""DCGAN for WGAN-GP: a generator and a critic for pictures of 28 to 128 pixels, with or without a class condition.

Radford et al. 2015 (https://arxiv.org/abs/1511.06434) for the shape, Gulrajani et al. 2017
(https://arxiv.org/abs/1704.00028) for what changes with a gradient penalty: the critic ends in a plain number,
without a sigmoid, and none of its layers looks across the batch, since the penalty is a statement about each picture alone.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.nets.norm import GlobalBatchNorm

BASE_SIZES = {28: 7, 32: 4, 64: 4, 128: 4}  # picture size -> size of the smallest feature map


@dataclass(frozen=True)
class DcganConfig:
    """The shape of both nets; `Generator(DcganConfig(**arguments))` rebuilds one from `dataclasses.asdict`."""

    image_size: int = 32  # pixels a side
    channels: int = 1  # 1: grey, 3: colour
    latent_dim: int = 128
    width: int = 32  # feature maps at half the picture's size; doubled with every further halving
    num_classes: int = 0  # 0: no class condition
    norm: str = "group"  # the generator's: group or batch
    critic_norm: str = "none"  # none or layer

    def __post_init__(self) -> None:
        if self.image_size not in BASE_SIZES:
            raise ValueError(
                f"image_size {self.image_size} is not supported: use one of {', '.join(map(str, BASE_SIZES))}"
            )
        if self.channels not in (1, 3):
            raise ValueError(
                f"channels {self.channels} is not supported: use 1 (grey) or 3 (colour)"
            )
        if min(self.latent_dim, self.width) < 1 or self.num_classes < 0:
            raise ValueError(
                f"latent_dim and width must be positive and num_classes at least 0, not {self}"
            )
        if self.norm not in ("group", "batch") or self.critic_norm not in ("none", "layer"):
            raise ValueError(f"norm is group or batch and critic_norm none or layer, not {self}")

    @property
    def base_size(self) -> int:
        return BASE_SIZES[self.image_size]

    @property
    def widths(self) -> list[int]:
        """Feature maps of each scale from half the picture's size down to `base_size`."""
        halvings = (self.image_size // self.base_size).bit_length() - 1
        return [self.width * 2**i for i in range(halvings)]


class Generator(nn.Module):
    """Pictures from noise: transposed convolutions that double the size, from `base_size` to `image_size`.

    norm group: GroupNorm with one group stands where the paper has BatchNorm. It normalises each picture by itself: a
    picture does not depend on its company, neither in training nor in serving. norm batch: the paper's, over the global batch.
    The class condition is an embedding beside the latent (Mirza & Osindero 2014, https://arxiv.org/abs/1411.1784).
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
        """Pictures in [-1, 1].

        Args:
            latents: (B, latent_dim), standard normal.
            labels: (B) int64 in [0, num_classes) of a conditional generator; None of an unconditional one.

        Returns:
            (B, channels, image_size, image_size).
        """
        if self.embed is not None:
            latents = torch.cat([latents, self.embed(labels)], dim=1)  # (B, 2 * latent_dim)
        return self.stages(latents)


class Critic(nn.Module):
    """One number a picture: how real it looks, on a scale without ends. Strided convolutions, the first of them without a norm.

    critic_norm layer: LayerNorm over each picture's features, as the paper of the penalty has it where one is wanted.

    The class condition is a projection: the class embedding's inner product with the features is added to the number
    (Miyato & Koyama 2018, https://arxiv.org/abs/1802.05637).
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
        """Scores.

        Args:
            images: (B, channels, image_size, image_size) in [-1, 1].
            labels: (B) int64 in [0, num_classes) of a conditional critic; None of an unconditional one.

        Returns:
            (B).
        """
        features = self.features(images)  # (B, widest * base_size**2)
        scores = self.score(features).squeeze(1)
        if self.embed is not None:
            scores = scores + (self.embed(labels) * features).sum(dim=1)
        return scores
