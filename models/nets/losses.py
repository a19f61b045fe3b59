"""The GAN's objectives as functions of tensors. None of them steps an optimizer.

wgan-gp: Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028. lsgan: Mao et al. 2017, https://arxiv.org/abs/1611.04076.
hinge: Lim & Ye 2017, https://arxiv.org/abs/1705.02894. non-saturating: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661.
The last three may be held back by R1, Mescheder et al. 2018, https://arxiv.org/abs/1801.04406.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Critic = Callable[[Tensor], Tensor]  # pictures (B, C, H, W) -> scores (B)


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean(fake) - mean(real) of scores (B): minus the critic's estimate of the Wasserstein distance."""
    return fake_scores.mean() - real_scores.mean()


def wasserstein_generator_loss(fake_scores: Tensor) -> Tensor:
    """-mean(fake) of scores (B)."""
    return -fake_scores.mean()


def least_squares_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean((real - 1)^2) / 2 + mean(fake^2) / 2 of scores (B): real pictures are to score 1, fakes 0."""
    return ((real_scores - 1).square().mean() + fake_scores.square().mean()) / 2


def least_squares_generator_loss(fake_scores: Tensor) -> Tensor:
    """mean((fake - 1)^2) / 2 of scores (B)."""
    return (fake_scores - 1).square().mean() / 2


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean(max(0, 1 - real)) + mean(max(0, 1 + fake)) of scores (B)."""
    return functional.relu(1 - real_scores).mean() + functional.relu(1 + fake_scores).mean()


def non_saturating_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The binary cross-entropy of scores (B) taken as logits: mean(-log s(real)) + mean(-log(1 - s(fake))), s the logistic function."""
    return functional.softplus(-real_scores).mean() + functional.softplus(fake_scores).mean()


def non_saturating_generator_loss(fake_scores: Tensor) -> Tensor:
    """mean(-log s(fake)) of scores (B): its gradient does not vanish where the critic is sure."""
    return functional.softplus(-fake_scores).mean()


def interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """One point on the line from each fake to its real picture.

    Args:
        real, fake: (B, C, H, W).
        mix: (B) in [0, 1), drawn uniformly for each pair: 0 is the fake picture, 1 the real one.

    Returns:
        (B, C, H, W).
    """
    mix = mix.view(-1, 1, 1, 1)
    return mix * real.detach() + (1 - mix) * fake.detach()


def gradient_penalty(critic: Critic, points: Tensor) -> Tensor:
    """mean((||d critic / d point||_2 - 1)^2) over `points` (B, C, H, W), to be multiplied by 10 (the paper's lambda)."""
    return (_slopes(critic, points).norm(dim=1) - 1).square().mean()


def r1_penalty(critic: Critic, real: Tensor) -> Tensor:
    """mean(||d critic / d real||_2^2) / 2 over real pictures (B, C, H, W), to be multiplied by the paper's gamma."""
    return _slopes(critic, real).square().sum(dim=1).mean() / 2


def _slopes(critic: Critic, points: Tensor) -> Tensor:
    """d critic / d point of each point, (B, C * H * W), differentiable by the critic's parameters.

    Under autocast it is computed in float32: the squares of small gradients vanish in half precision.
    """
    points = points.detach().requires_grad_()
    with torch.autocast(points.device.type, enabled=False):
        scores = critic(points)
        (gradients,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
    return gradients.flatten(1)


@dataclass(frozen=True)
class Objective:
    """What critic and generator minimise.

    Attributes:
        critic_loss: of the real and the fake pictures' scores (B), (B).
        generator_loss: of the fake pictures' scores (B).
        penalty: added to the critic's loss, times a weight: of the critic, real and fake pictures (B, C, H, W), and `interpolate`'s mix (B).
    """

    critic_loss: Callable[[Tensor, Tensor], Tensor]
    generator_loss: Callable[[Tensor], Tensor]
    penalty: Callable[[Critic, Tensor, Tensor, Tensor], Tensor]


def _between(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    return gradient_penalty(critic, interpolate(real, fake, mix))


def _at_real(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    return r1_penalty(critic, real)


OBJECTIVES = {
    "wgan-gp": Objective(wasserstein_critic_loss, wasserstein_generator_loss, _between),
    "lsgan": Objective(least_squares_critic_loss, least_squares_generator_loss, _at_real),
    "hinge": Objective(hinge_critic_loss, wasserstein_generator_loss, _at_real),
    "non-saturating": Objective(
        non_saturating_critic_loss, non_saturating_generator_loss, _at_real
    ),
}
