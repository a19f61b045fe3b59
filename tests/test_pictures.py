"""Grids, walks between latents and the film of a training: by hand, by their definitions, and as pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from models.latents import slerp

Z = 64


def plain(levels: list[float], size: int = 8, channels: int = 1) -> torch.Tensor:
    """Images (N, C, size, size), each of one level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, channels, size, size)


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [2, 6, 7])
def test_a_grid_is_torchvisions(channels: int, count: int) -> None:
    images = (
        torch.rand(count, channels, 8, 5, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    )  # past both ends too
    expected = make_grid(
        images,
        nrow=2,
        padding=pictures.GUTTER,
        normalize=True,
        value_range=(-1, 1),
        pad_value=128 / 255,
    )
    made = pictures.grid(images, 2)
    assert made.dtype == np.uint8
    assert np.array_equal(made, (expected * 255).round().byte().permute(1, 2, 0).numpy())


def test_one_picture_is_a_grid_too_and_half_a_row_stays_empty() -> None:
    made = pictures.grid(plain([1.0]), 3)
    assert made.shape == (12, 32, 3)
    assert (made[2:10, 2:10] == 255).all()
    assert (made[:, 12:] == 128).all()


def test_what_is_drawn_is_not_changed() -> None:
    images = torch.full((1, 1, 4, 4), 2.0, requires_grad=True)
    pictures.grid(images, 1)
    assert (images == 2).all()


def test_a_grid_is_taken_apart_again() -> None:
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    found = pictures.cells(pictures.grid(images, 3), 3)
    assert found.shape == (2, 3, 8, 8, 3)
    assert np.array_equal(found.reshape(6, -1)[:, 0], [0, 51, 102, 153, 204, 255])


@pytest.mark.parametrize("shape", [(12, 33), (13, 32), (2, 2), (12, 8)])
def test_what_is_no_grid_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=f"a picture of {shape[1]} x {shape[0]} pixels is no grid of 3 columns"
    ):
        pictures.cells(np.zeros((*shape, 3), np.uint8), 3)


# ---------------------------------------------------------------- latents


def test_walks_go_round() -> None:
    latents = torch.randn(3, Z, generator=torch.Generator().manual_seed(3))
    walks = pictures.interpolations(latents, 5).view(3, 5, Z)
    assert torch.allclose(walks[:, 0], latents)
    assert torch.allclose(walks[:, -1], latents[[1, 2, 0]], atol=1e-6)
    assert np.array_equal(walks[1, 2], slerp(latents[1].numpy(), latents[2].numpy(), 0.5))


# ---------------------------------------------------------------- the film


def test_steps_are_spread_geometrically_with_both_ends() -> None:
    assert pictures.as_shards([300, 100, 200]) == [100, 200, 300]
    steps = pictures.as_shards(range(0, 20_001, 50))
    assert steps[0] == 0
    assert steps[-1] == 20_000
    assert len(steps) <= pictures.FRAMES
    chosen = pictures.as_shards(range(100, 12_801, 100))
    assert chosen == [100, 200, 400, 800, 1600, 3200, 6400, 12800]
    assert pictures.as_shards([7]) == [7]


def frame(level: int, size: int, rows: int = 2) -> np.ndarray:
    """A grid whose picture in row r and column c is of level + 10 r + c."""
    values = [
        (level + 10 * row + column) / 127.5 - 1
        for row in range(rows)
        for column in range(pictures.GRID_COLUMNS)
    ]
    return pictures.grid(plain(values, size), pictures.GRID_COLUMNS)


@pytest.mark.parametrize(("size", "scale"), [(28, 2), (32, 2), (64, 1), (128, 1)])
def test_a_film_shows_the_same_latents_in_each_row_and_real_ones_below(
    size: int, scale: int
) -> None:
    made = opened(
        pictures.film([(100, frame(0, size)), (1000, frame(100, size))], real=frame(200, size))
    )
    pitch = scale * size + pictures.GUTTER
    assert made.shape[1] == pictures.MARGIN + 10 * pitch
    column = [made[:, pictures.MARGIN + index * pitch + pitch // 2, 0] for index in range(10)]
    for index in range(10):
        shown = [
            int(level)
            for level, count in zip(*np.unique(column[index], return_counts=True), strict=True)
            if count == scale * size
        ]
        assert shown == [index, 100 + index, 200 + index]


def test_a_conditional_film_has_a_column_for_each_class() -> None:
    names = ["Ankle boot", "Bag", "Coat"]
    made = opened(pictures.film([(1, frame(50, 64, rows=3))], names))
    assert made.shape[1] == pictures.MARGIN + 3 * 66
    bottom = made[-10, pictures.MARGIN + 5 :: 66, 0]
    assert bottom.tolist() == [50, 60, 70]
    unnamed = opened(pictures.film([(1, frame(50, 64, rows=3))]))
    assert made.shape[0] > unnamed.shape[0], "the names stand above"


def test_one_frame_is_a_film() -> None:
    assert opened(pictures.film([(20, frame(0, 28))])).shape[0] < 100
