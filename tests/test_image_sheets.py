"""PNG files and contact sheets, against values worked out by hand and torchvision's grid."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from models.images import contact_sheet, png, split_sheet


def numbered(count: int, height: int = 8, width: int = 5, channels: int = 3) -> np.ndarray:
    """Return images of one level each: 0, 10, 20, ..."""
    levels = 10 * np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return np.broadcast_to(levels, (count, height, width, channels))


@pytest.mark.parametrize(
    ("shape", "mode"), [((8, 5), "L"), ((8, 5, 1), "L"), ((8, 5, 3), "RGB")], ids=str
)
def test_png_keeps_every_pixel(shape: tuple[int, ...], mode: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    content = png(image)
    assert content.startswith(b"\x89PNG\r\n")
    opened = Image.open(io.BytesIO(content))
    assert opened.mode == mode
    assert np.array_equal(np.asarray(opened).reshape(shape), image)
    assert png(opened) == content


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gutter", [0, 2])
@pytest.mark.parametrize("count", [2, 6, 7])
def test_sheet_equals_torchvisions_grid(count: int, gutter: int, channels: int) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, 8, 5, channels), np.uint8)
    sheet = contact_sheet(images, columns=2, gutter=gutter, background=128)
    grid = make_grid(
        torch.from_numpy(images).permute(0, 3, 1, 2), nrow=2, padding=gutter, pad_value=128
    )
    assert sheet.dtype == np.uint8
    assert np.array_equal(sheet, grid.permute(1, 2, 0).numpy()[..., :channels])


def test_sheet_is_filled_row_by_row_and_its_rest_is_background() -> None:
    sheet = contact_sheet(numbered(4), columns=3)
    assert sheet.shape == (2 * 8, 3 * 5, 3)
    assert sheet[::8, ::5, 0].tolist() == [[0, 10, 20], [30, 255, 255]]
    assert contact_sheet(numbered(1), columns=3, gutter=1).shape == (1 + 9, 1 + 3 * 6, 3)


@pytest.mark.parametrize("gutter", [0, 2])
def test_split_sheet_inverts_contact_sheet(gutter: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    cells = split_sheet(contact_sheet(images, 3, gutter), 3, gutter)
    assert cells.shape == (2, 3, 8, 8, 3)
    assert np.array_equal(cells.reshape(images.shape), images)


@pytest.mark.parametrize("shape", [(12, 33), (13, 32), (2, 2), (12, 8)], ids=str)
def test_image_of_another_size_is_not_a_sheet(shape: tuple[int, int]) -> None:
    message = f"an image of {shape[1]} x {shape[0]} pixels is not a sheet of 3 columns"
    with pytest.raises(ValueError, match=message):
        split_sheet(np.zeros((*shape, 3), np.uint8), 3, gutter=2)
