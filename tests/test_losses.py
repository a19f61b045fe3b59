"""GAN losses and gradient penalties against values worked out by hand."""

import math
from collections.abc import Callable

import pytest
import torch

from models.nets.losses import (
    OBJECTIVES,
    Critic,
    gradient_penalty,
    interpolate,
    r1_penalty,
    wasserstein_critic_loss,
    wasserstein_generator_loss,
)


def linear(weight: torch.Tensor) -> Critic:
    return lambda images: (images * weight).flatten(1).sum(dim=1)


def test_wasserstein_losses_equal_values_worked_out_by_hand() -> None:
    real, fake = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-1.0, 3.0])
    assert wasserstein_critic_loss(real, fake).item() == 1.0 - 3.0
    assert wasserstein_generator_loss(fake).item() == -1.0


def test_critic_loss_raises_real_scores_and_lowers_fake_ones() -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    of_real, of_fake = torch.autograd.grad(wasserstein_critic_loss(real, fake), (real, fake))
    assert torch.equal(of_real, torch.full((4,), -0.25))
    assert torch.equal(of_fake, torch.full((4,), 0.25))


REAL, FAKE = torch.tensor([1.0, 3.0, -0.5]), torch.tensor([-2.0, 0.0, 0.5])
BY_HAND = {  # the critic's loss of REAL and FAKE, the generator's loss of FAKE
    "wgan-gp": (-0.5 - 3.5 / 3, 0.5),
    "lsgan": ((0 + 4 + 2.25) / 6 + (4 + 0 + 0.25) / 6, (9 + 1 + 0.25) / 6),
    "hinge": ((0 + 0 + 1.5) / 3 + (0 + 1 + 1.5) / 3, 0.5),
    "non-saturating": (
        sum(math.log1p(math.exp(-x)) for x in (1, 3, -0.5)) / 3
        + sum(math.log1p(math.exp(x)) for x in (-2, 0, 0.5)) / 3,
        sum(math.log1p(math.exp(-x)) for x in (-2, 0, 0.5)) / 3,
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_equal_values_worked_out_by_hand(name: str) -> None:
    objective = OBJECTIVES[name]
    assert (
        objective.critic_loss(REAL, FAKE).item(),
        objective.generator_loss(FAKE).item(),
    ) == pytest.approx(BY_HAND[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_separate_scores_and_raise_those_of_the_generator(name: str) -> None:
    real, fake, made = (torch.full((4,), score, requires_grad=True) for score in (0.0, 0.0, 0.5))
    OBJECTIVES[name].critic_loss(real, fake).backward()
    OBJECTIVES[name].generator_loss(made).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert made.grad is not None
    assert real.grad.max() < 0  # a higher score of a real image lowers the loss
    assert fake.grad.min() >= 0
    assert made.grad.max() < 0


def test_r1_is_half_the_squared_gradient_norm() -> None:
    """The gradient of a linear critic is its weight w; norm 5 gives 25 / 2, the derivative is w."""
    weight = torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 2, 2).requires_grad_()
    penalty = r1_penalty(linear(weight), torch.rand(6, 1, 2, 2))
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert penalty.item() == pytest.approx(12.5)
    assert torch.allclose(gradient, weight.detach())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wgan-gp", 0.25), *((name, 0.5) for name in OBJECTIVES if name != "wgan-gp")],
)
def test_penalty_is_taken_at_the_right_points(name: str, expected: float) -> None:
    """The critic |x|^2 / 2 has the gradient x.

    wgan-gp takes its norm halfway between 1 and 0, R1 at the real image, where it is 1.
    """
    real, fake = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    real[:, 0, 0, 0] = 1.0
    penalty = OBJECTIVES[name].penalty(
        lambda images: images.flatten(1).square().sum(dim=1) / 2, real, fake, torch.full((2,), 0.5)
    )
    assert penalty.item() == pytest.approx(expected)


@pytest.mark.parametrize("penalty", [gradient_penalty, r1_penalty])
def test_penalties_are_computed_in_fp32_under_autocast(
    penalty: Callable[[Critic, torch.Tensor], torch.Tensor],
) -> None:
    layer = torch.nn.Linear(4, 1)
    points = torch.rand(5, 1, 2, 2)
    seen = []

    def critic(images: torch.Tensor) -> torch.Tensor:
        scores = layer(images.flatten(1)).squeeze(1)
        seen.append(scores.dtype)
        return scores

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = penalty(critic, points)
    assert seen == [torch.float32]
    assert torch.equal(inside, penalty(critic, points))


def test_penalty_is_the_squared_distance_of_the_gradient_norm_from_one() -> None:
    """The gradient is the weight w; norm 5 gives (5 - 1)^2, and the derivative 2 (5 - 1) w / 5."""
    weight = torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 2, 2).requires_grad_()
    penalty = gradient_penalty(
        linear(weight), interpolate(torch.rand(6, 1, 2, 2), torch.rand(6, 1, 2, 2), torch.rand(6))
    )
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert penalty.item() == pytest.approx(16.0)
    assert torch.allclose(gradient, 8 * weight.detach() / 5)


def test_penalty_is_the_mean_over_single_images() -> None:
    """The critic |x|^2 / 2 has the gradient x: the norms 0, 1, 3 give (1 + 0 + 4) / 3."""
    points = torch.zeros(3, 1, 2, 2)
    points[1, 0, 0, 0], points[2, 0, 1, 1] = 1.0, -3.0
    penalty = gradient_penalty(
        lambda images: images.flatten(1).square().sum(dim=1) / 2, points.requires_grad_()
    )
    assert penalty.item() == pytest.approx(5 / 3)


def test_penalty_of_a_constant_critic_has_finite_gradients() -> None:
    weight = torch.zeros(1, 2, 2, requires_grad=True)
    penalty = gradient_penalty(linear(weight), torch.ones(2, 1, 2, 2, requires_grad=True))
    penalty.backward()
    assert penalty.item() == 1.0
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_interpolation_mixes_each_pair_with_its_own_factor() -> None:
    real, fake = (
        torch.ones(3, 1, 2, 2, requires_grad=True),
        torch.zeros(3, 1, 2, 2, requires_grad=True),
    )
    points = interpolate(real, fake, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(
        points.detach(), torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    )
    assert not points.requires_grad  # neither network may learn through the points


def test_penalty_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    critic = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Flatten(0),
        torch.nn.Unflatten(0, (4, -1)),
    )
    points = torch.randn(4, 1, 8, 8, requires_grad=True)

    def score(images: torch.Tensor) -> torch.Tensor:
        return critic(images).sum(dim=1)

    expected = gradient_penalty(score, points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient_penalty(score, points)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_critic_of_slope_one_has_no_penalty_and_estimates_the_distance() -> None:
    """A critic with slope 1 between fake and real is what the penalty asks for."""
    real, fake = torch.full((5, 1, 2, 2), 1.0), torch.full((5, 1, 2, 2), -1.0)
    weight = torch.full((1, 2, 2), 0.5)  # norm 1
    assert gradient_penalty(
        linear(weight), interpolate(real, fake, torch.rand(5))
    ).item() == pytest.approx(0, abs=1e-10)
    distance = -wasserstein_critic_loss(linear(weight)(real), linear(weight)(fake)).item()
    assert distance == pytest.approx(math.dist([1.0] * 4, [-1.0] * 4))
