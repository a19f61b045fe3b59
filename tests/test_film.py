"""Image grids, interpolations between latents, and the film of a training run."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from models.images import split_sheet
from models.latents import slerp
from train.gan import film

Z = 64


def constant(levels: list[float], size: int = 8, channels: int = 1) -> torch.Tensor:
    """Images (N, C, size, size), each of one level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, channels, size, size)


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# ---- grids


def test_nan_and_infinite_values_are_drawn_without_a_warning() -> None:
    images = constant([float("nan"), float("inf"), float("-inf"), 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = split_sheet(film.grid(images, 2), 2, film.GUTTER).reshape(4, 8, 8, 3)
    assert [int(image.max()) for image in drawn] == [0, 255, 0, 128]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [2, 6, 7])
def test_grid_equals_torchvision(channels: int, count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    # Some values are outside of [-1, 1].
    images = torch.rand(count, channels, 8, 5, generator=draw) * 2.4 - 1.2
    expected = make_grid(
        images,
        nrow=2,
        padding=film.GUTTER,
        normalize=True,
        value_range=(-1, 1),
        pad_value=128 / 255,
    )
    drawn = film.grid(images, 2)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn, (expected * 255).round().byte().permute(1, 2, 0).numpy())


def test_grid_of_one_image_leaves_the_rest_of_its_row_empty() -> None:
    drawn = film.grid(constant([1.0]), 3)
    assert drawn.shape == (12, 32, 3)
    assert (drawn[2:10, 2:10] == 255).all()
    assert (drawn[:, 12:] == 128).all()


def test_grid_does_not_change_its_input() -> None:
    images = torch.full((1, 1, 4, 4), 2.0, requires_grad=True)
    film.grid(images, 1)
    assert (images == 2).all()


def test_grid_maps_minus_one_to_black_and_one_to_white() -> None:
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    cells = split_sheet(film.grid(images, 3), 3, film.GUTTER)
    assert cells.shape == (2, 3, 8, 8, 3)
    assert np.array_equal(cells.reshape(6, -1)[:, 0], [0, 51, 102, 153, 204, 255])


# ---- latents


def test_interpolations_go_from_each_latent_to_the_next_and_back_to_the_first() -> None:
    latents = torch.randn(3, Z, generator=torch.Generator().manual_seed(3))
    rows = film.interpolations(latents, 5).view(3, 5, Z)
    assert torch.allclose(rows[:, 0], latents)
    assert torch.allclose(rows[:, -1], latents[[1, 2, 0]], atol=1e-6)
    assert np.array_equal(rows[1, 2], slerp(latents[1].numpy(), latents[2].numpy(), 0.5))


# ---- the film


def test_selected_steps_are_spaced_geometrically_and_include_both_ends() -> None:
    assert film.select_steps([300, 100, 200]) == [100, 200, 300]
    steps = film.select_steps(range(0, 20_001, 50))
    assert steps[0] == 0
    assert steps[-1] == 20_000
    assert len(steps) <= film.FRAMES
    selected = film.select_steps(range(100, 12_801, 100))
    assert selected == [100, 200, 400, 800, 1600, 3200, 6400, 12800]
    assert film.select_steps([7]) == [7]


def frame(level: int, size: int, rows: int = 2) -> np.ndarray:
    """A grid whose image in row r and column c has the level `level` + 10 r + c."""
    values = [
        (level + 10 * row + column) / 127.5 - 1
        for row in range(rows)
        for column in range(film.GRID_COLUMNS)
    ]
    return film.grid(constant(values, size), film.GRID_COLUMNS)


@pytest.mark.parametrize(("size", "scale"), [(28, 2), (32, 2), (64, 1), (128, 1)])
def test_film_shows_the_same_latents_in_each_row_and_real_images_below(
    size: int, scale: int
) -> None:
    frames = [(100, frame(0, size)), (1000, frame(100, size))]
    drawn = decode(film.film(frames, real=frame(200, size)))
    pitch = scale * size + film.GUTTER
    assert drawn.shape[1] == film.MARGIN + 10 * pitch
    for index in range(10):
        column = drawn[:, film.MARGIN + index * pitch + pitch // 2, 0]
        levels, counts = np.unique(column, return_counts=True)
        shown = [int(level) for level in levels[counts == scale * size]]
        assert shown == [index, 100 + index, 200 + index]


def test_film_of_a_conditional_generator_has_a_column_per_class() -> None:
    names = ["Ankle boot", "Bag", "Coat"]
    drawn = decode(film.film([(1, frame(50, 64, rows=3))], names))
    assert drawn.shape[1] == film.MARGIN + 3 * 66
    bottom = drawn[-10, film.MARGIN + 5 :: 66, 0]
    assert bottom.tolist() == [50, 60, 70]
    without_names = decode(film.film([(1, frame(50, 64, rows=3))]))
    assert drawn.shape[0] > without_names.shape[0], "the names are above the images"


def test_film_of_a_single_step_has_one_row() -> None:
    assert decode(film.film([(20, frame(0, 28))])).shape[0] < 100
