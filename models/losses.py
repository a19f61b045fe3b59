"""The GAN's objective as functions of tensors: Wasserstein distance with a gradient penalty (WGAN-GP).

Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028. None of them steps an optimizer.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean(fake) - mean(real) of scores (B): minus the critic's estimate of the Wasserstein distance."""
    return fake_scores.mean() - real_scores.mean()


def wasserstein_generator_loss(fake_scores: Tensor) -> Tensor:
    """-mean(fake) of scores (B)."""
    return -fake_scores.mean()


def interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """One point on the line from each fake to its real picture, ready to be differentiated by.

    Args:
        real, fake: (B, C, H, W).
        mix: (B) in [0, 1), drawn uniformly for each pair: 0 is the fake picture, 1 the real one.

    Returns:
        (B, C, H, W), a leaf that requires a gradient.
    """
    mix = mix.view(-1, 1, 1, 1)
    return (mix * real.detach() + (1 - mix) * fake.detach()).requires_grad_()


def gradient_penalty(critic: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """mean((||d critic / d point||_2 - 1)^2) over `points` (B, C, H, W), to be multiplied by 10 (the paper's lambda).

    It is differentiable by the critic's parameters. Under autocast it is computed in float32: the squares of small
    gradients vanish in half precision.
    """
    with torch.autocast(points.device.type, enabled=False):
        scores = critic(points)
        (gradients,) = torch.autograd.grad(scores.sum(), points, create_graph=True)  # (B, C, H, W)
        return (gradients.flatten(1).norm(dim=1) - 1).square().mean()
