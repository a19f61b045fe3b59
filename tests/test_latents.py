"""Latents: from a seed, truncated, interpolated; against worked-out values and torch."""

import math

import numpy as np
import pytest
import torch

from models.latents import seeded_latents, slerp, truncated, walk

Z = 64


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """(2, Z) standard normal, float64."""
    return np.random.default_rng(1).standard_normal((2, Z))


# ---------------------------------------------------------------- truncation


def test_truncated_latents_have_a_truncated_normal_distribution() -> None:
    """Compare the quantiles of 20,000 values with those of torch's truncated normal."""
    drawn = truncated(seeded_latents(3, 20, 1000), 1.5)
    reference = torch.nn.init.trunc_normal_(
        torch.empty(20_000), a=-1.5, b=1.5, generator=torch.Generator().manual_seed(0)
    ).numpy()
    assert (drawn.dtype, drawn.shape) == (np.float32, (20, 1000))
    assert np.abs(drawn).max() <= 1.5
    levels = np.linspace(0.01, 0.99, 21)
    np.testing.assert_allclose(
        np.quantile(drawn, levels), np.quantile(reference, levels), atol=0.04
    )


def test_truncation_keeps_order_and_sign() -> None:
    values = np.array([-6.0, -1.0, 0.0, 1e-3, 0.5, 2.0, 6.0], np.float32)
    made = truncated(values, 0.7)
    assert (np.diff(made) > 0).all()
    assert made[2] == 0
    assert made[1] == -truncated(np.array([1.0]), 0.7)[0]


def test_large_threshold_changes_almost_nothing() -> None:
    latents = seeded_latents(5, 4, Z)
    np.testing.assert_allclose(truncated(latents, 5.0), latents, atol=2e-3)


def test_truncation_of_a_latent_does_not_depend_on_the_others() -> None:
    latents = seeded_latents(5, 4, Z)
    np.testing.assert_array_equal(truncated(latents, 1.0)[2:3], truncated(latents[2:3], 1.0))


# ---------------------------------------------------------------- interpolation


def test_slerp_of_unit_vectors_stays_on_the_unit_circle() -> None:
    """Halfway is the diagonal of length 1; linear interpolation would give length 0.71."""
    first, second = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    np.testing.assert_allclose(slerp(first, second, 0.5), [math.sqrt(0.5)] * 2)
    np.testing.assert_allclose(slerp(first, second, 1 / 3), [math.cos(math.pi / 6), 0.5])


def test_walk_has_equal_angles_and_lengths(noise: np.ndarray) -> None:
    first, second = noise
    second = second * np.linalg.norm(first) / np.linalg.norm(second)
    points = walk(first, second, 7)
    lengths = np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(lengths, lengths[0])
    turns = np.arccos((points[1:] * points[:-1]).sum(axis=1) / lengths[0] ** 2)
    np.testing.assert_allclose(turns, turns[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_walk_starts_and_ends_exactly_at_the_latents(noise: np.ndarray, dtype: type) -> None:
    first, second = noise.astype(dtype)
    for other in (second, first, -first):
        points = walk(first, other, 5)
        assert points.dtype == dtype
        np.testing.assert_array_equal(points[[0, -1]], [first, other])


def test_slerp_of_parallel_vectors_is_linear(noise: np.ndarray) -> None:
    for scale in (1.0, 2.0, -1.0):  # equal, same direction, opposite directions
        np.testing.assert_allclose(
            slerp(noise, scale * noise, 0.25), (0.75 + 0.25 * scale) * noise, atol=1e-5
        )
