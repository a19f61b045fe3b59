"""Generated images as PNG files."""

# TODO(lead): replace both functions by `png` and `contact_sheet` of models/images.py.

import io
import math

import numpy as np
from PIL import Image


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange images in rows of `columns`; unused cells are white.

    Args:
        images: (N, H, W, C) uint8.

    Returns:
        (rows x H, columns x W, C) uint8.
    """
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:count] = images
    return (
        cells.reshape(rows, columns, height, width, channels)
        .swapaxes(1, 2)
        .reshape(rows * height, columns * width, channels)
    )


def png(image: np.ndarray) -> bytes:
    """Encode a (H, W, C) uint8 image as a PNG file, in grayscale if C is 1."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()
