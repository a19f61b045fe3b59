"""Losses and gradient penalties of GANs, as functions of tensors.

wgan-gp: Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028.
lsgan: Mao et al. 2017, https://arxiv.org/abs/1611.04076.
hinge: Lim & Ye 2017, https://arxiv.org/abs/1705.02894.
non-saturating: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661.
The last three can be combined with R1, Mescheder et al. 2018, https://arxiv.org/abs/1801.04406.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Critic = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> scores (B)


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return mean(fake) - mean(real) of scores (B).

    It is minus the critic's estimate of the Wasserstein distance.
    """
    return fake_scores.mean() - real_scores.mean()


def wasserstein_generator_loss(fake_scores: Tensor) -> Tensor:
    """Return -mean(fake) of scores (B)."""
    return -fake_scores.mean()


def least_squares_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return mean((real - 1)^2) / 2 + mean(fake^2) / 2 of scores (B).

    The targets are 1 for real images and 0 for fake ones.
    """
    return ((real_scores - 1).square().mean() + fake_scores.square().mean()) / 2


def least_squares_generator_loss(fake_scores: Tensor) -> Tensor:
    """Return mean((fake - 1)^2) / 2 of scores (B)."""
    return (fake_scores - 1).square().mean() / 2


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return mean(max(0, 1 - real)) + mean(max(0, 1 + fake)) of scores (B)."""
    return functional.relu(1 - real_scores).mean() + functional.relu(1 + fake_scores).mean()


def non_saturating_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return the binary cross-entropy of scores (B), used as logits.

    It is mean(-log s(real)) + mean(-log(1 - s(fake))), where s is the logistic function.
    """
    return functional.softplus(-real_scores).mean() + functional.softplus(fake_scores).mean()


def non_saturating_generator_loss(fake_scores: Tensor) -> Tensor:
    """Return mean(-log s(fake)) of scores (B), where s is the logistic function.

    Its gradient does not vanish where the critic is certain.
    """
    return functional.softplus(-fake_scores).mean()


def interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Return one point on the line between each fake image and its real one.

    Args:
        real, fake: (B, C, H, W).
        mix: (B), drawn uniformly from [0, 1): 0 is the fake image, 1 the real one.

    Returns:
        (B, C, H, W), detached.
    """
    mix = mix.view(-1, 1, 1, 1)
    return mix * real.detach() + (1 - mix) * fake.detach()


def gradient_penalty(critic: Critic, points: Tensor) -> Tensor:
    """Return mean((||d critic / d point||_2 - 1)^2) over `points` (B, C, H, W).

    The paper multiplies it by lambda = 10.
    """
    penalty: Tensor = (_gradients(critic, points).norm(dim=1) - 1).square().mean()
    return penalty


def r1_penalty(critic: Critic, real: Tensor) -> Tensor:
    """Return mean(||d critic / d real||_2^2) / 2 over real images (B, C, H, W).

    The paper multiplies it by gamma.
    """
    return _gradients(critic, real).square().sum(dim=1).mean() / 2


def _gradients(critic: Critic, points: Tensor) -> Tensor:
    """Return d critic / d point of each point, (B, C * H * W), differentiable.

    They are computed in float32 also under autocast: in half precision the squares of small
    gradients underflow.
    """
    points = points.detach().requires_grad_()
    with torch.autocast(points.device.type, enabled=False):
        scores = critic(points)
        (gradients,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
    return gradients.flatten(1)


@dataclass(frozen=True)
class Objective:
    """What critic and generator minimize.

    Attributes:
        critic_loss: a function of the scores (B) of real images and those (B) of fake images.
        generator_loss: a function of the scores (B) of fake images.
        penalty: a function of the critic, real and fake images (B, C, H, W) and the `mix` (B) of
            `interpolate`. Times a weight, it is added to the critic's loss.
    """

    critic_loss: Callable[[Tensor, Tensor], Tensor]
    generator_loss: Callable[[Tensor], Tensor]
    penalty: Callable[[Critic, Tensor, Tensor, Tensor], Tensor]


def _penalty_between(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    return gradient_penalty(critic, interpolate(real, fake, mix))


def _penalty_at_real(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    return r1_penalty(critic, real)


OBJECTIVES = {
    "wgan-gp": Objective(wasserstein_critic_loss, wasserstein_generator_loss, _penalty_between),
    "lsgan": Objective(least_squares_critic_loss, least_squares_generator_loss, _penalty_at_real),
    "hinge": Objective(hinge_critic_loss, wasserstein_generator_loss, _penalty_at_real),
    "non-saturating": Objective(
        non_saturating_critic_loss, non_saturating_generator_loss, _penalty_at_real
    ),
}
