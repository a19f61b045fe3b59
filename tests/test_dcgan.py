"""DCGAN's shapes and ranges, and independence of the images in a batch."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.nets.dcgan import Critic, DcganConfig, Generator
from models.nets.norm import GlobalBatchNorm

CONFIGS = [
    DcganConfig(image_size=size, channels=channels, latent_dim=16, width=4, num_classes=classes)
    for size in (28, 32, 64, 128)
    for channels in (1, 3)
    for classes in (0, 5)
]


def labels_for(config: DcganConfig, count: int) -> Tensor | None:
    return torch.arange(count) % config.num_classes if config.num_classes else None


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.image_size}x{c.channels}c{c.num_classes}"
)
def test_images_have_the_configured_shape_and_range_and_one_score_each(config: DcganConfig) -> None:
    torch.manual_seed(0)
    labels = labels_for(config, 3)
    images = Generator(config)(torch.randn(3, 16), labels)
    assert images.shape == (3, config.channels, config.image_size, config.image_size)
    assert images.abs().max() <= 1
    assert Critic(config)(images, labels).shape == (3,)


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("net", ["generator", "critic"])
def test_image_does_not_depend_on_the_rest_of_its_batch(net: str, num_classes: int) -> None:
    """Gradient penalty, DDP and serving then compute the same function, in train and eval mode."""
    torch.manual_seed(0)
    config = DcganConfig(latent_dim=16, width=4, num_classes=num_classes)
    module = (Generator if net == "generator" else Critic)(config).double()
    inputs = (
        torch.randn(4, 16).double() if net == "generator" else torch.randn(4, 1, 32, 32).double()
    )
    labels = labels_for(config, 4)
    together = module(inputs, labels)
    alone = torch.cat(
        [
            module(inputs[i : i + 1], labels[i : i + 1] if labels is not None else None)
            for i in range(4)
        ]
    )
    assert torch.allclose(together, alone, atol=1e-12)
    assert torch.equal(module.eval()(inputs, labels), together)


def test_global_batch_norm_in_one_process_equals_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(3).double(), nn.BatchNorm2d(3).double()
    for _ in range(3):
        inputs = 2 + 3 * torch.randn(4, 3, 5, 5, dtype=torch.float64)
        one, two = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        made, expected = ours(one), theirs(two)
        assert torch.allclose(made, expected, atol=1e-12)
        weights = torch.randn_like(made)
        (gradient,) = torch.autograd.grad(made, one, weights)
        (expected_gradient,) = torch.autograd.grad(expected, two, weights)
        assert torch.allclose(gradient, expected_gradient, atol=1e-12)
    averages = theirs.state_dict()
    assert torch.allclose(ours.running_mean, averages["running_mean"], atol=1e-12)
    assert torch.allclose(ours.running_var, averages["running_var"], atol=1e-12)
    assert torch.allclose(ours.eval()(inputs), theirs.eval()(inputs), atol=1e-12)


def test_norms_are_the_configured_ones() -> None:
    config = DcganConfig(width=4, latent_dim=16, norm="batch", critic_norm="layer")
    assert sum(isinstance(module, GlobalBatchNorm) for module in Generator(config).modules()) == 3
    assert sum(isinstance(module, nn.GroupNorm) for module in Critic(config).modules()) == 2
    assert not any(isinstance(module, nn.GroupNorm) for module in Generator(config).modules())
    served = Generator(config).eval()
    latents = torch.randn(4, 16)
    alone = torch.cat([served(latents[i : i + 1]) for i in range(4)])
    assert torch.allclose(served(latents), alone, atol=1e-6), (
        "in eval mode an image must not depend on the rest of its batch"
    )
    with pytest.raises(
        ValueError, match=r"norm must be group or batch and critic_norm none or layer"
    ):
        DcganConfig(critic_norm="batch")


def test_critic_has_no_sigmoid_and_no_batch_norm() -> None:
    forbidden = (nn.Sigmoid, nn.Tanh, nn.BatchNorm2d, nn.SyncBatchNorm, GlobalBatchNorm)
    for config in CONFIGS:
        assert not [module for module in Critic(config).modules() if isinstance(module, forbidden)]
    torch.manual_seed(0)
    critic = Critic(DcganConfig(width=4))
    for module in critic.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    images = torch.randn(2, 1, 32, 32)
    assert torch.allclose(critic(1000 * images), 1000 * critic(images), rtol=1e-4), (
        "a score must not saturate"
    )


def test_class_changes_image_and_score() -> None:
    torch.manual_seed(0)
    config = DcganConfig(latent_dim=16, width=4, num_classes=5)
    latent, image = (
        torch.randn(1, 16).expand(5, -1),
        torch.randn(1, 1, 32, 32).expand(5, -1, -1, -1),
    )
    assert (
        len(Generator(config)(latent, torch.arange(5)).detach().round(decimals=4).unique(dim=0))
        == 5
    )
    assert len(Critic(config)(image, torch.arange(5)).detach().unique()) == 5


def test_every_parameter_has_a_gradient() -> None:
    config = DcganConfig(latent_dim=16, width=4, num_classes=2)
    generator, critic = Generator(config), Critic(config)
    labels = torch.tensor([0, 1])
    critic(generator(torch.randn(2, 16), labels), labels).sum().backward()
    for name, parameter in [*generator.named_parameters(), *critic.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_generator_is_rebuilt_from_its_config() -> None:
    first = Generator(DcganConfig(image_size=64, channels=3, latent_dim=16, width=4, num_classes=2))
    second = Generator(DcganConfig(**asdict(first.config)))
    second.load_state_dict(first.state_dict())
    latents, labels = torch.randn(2, 16), torch.tensor([1, 0])
    assert torch.equal(first(latents, labels), second(latents, labels))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 48),
        ("image_size", 0),
        ("channels", 4),
        ("latent_dim", 0),
        ("width", 0),
        ("num_classes", -1),
    ],
)
def test_invalid_config_is_an_error(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        DcganConfig(**{field: value})
