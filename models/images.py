"""Images as PNG files and contact sheets. NumPy and Pillow only: training and serving share it."""

import io
import math

import numpy as np
from PIL import Image


def png(image: np.ndarray | Image.Image) -> bytes:
    """Encode an image as PNG.

    Args:
        image: Pillow's, or uint8 of shape (H, W), (H, W, 1) or (H, W, 3); the first two give a
            grayscale PNG.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Return the pixels of generated images.

    Args:
        images: (N, C, H, W), floating point; values beyond [-1, 1] are clipped.

    Returns:
        (N, H, W, C) uint8.
    """
    return np.rint((images + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def contact_sheet(
    images: np.ndarray, columns: int, gutter: int = 0, background: int = 255
) -> np.ndarray:
    """Arrange images row by row on one sheet.

    Args:
        images: (N, H, W, C) uint8.
        columns: images per row.
        gutter: pixels between the images, and between them and the edges of the sheet.
        background: the level of gutters and of empty cells, 0 (black) to 255 (white).

    Returns:
        (rows * (H + gutter) + gutter, columns * (W + gutter) + gutter, C) uint8. Image i is in row
        i // columns and column i % columns.
    """
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    pitch = height + gutter, width + gutter
    cells = np.full((rows * columns, *pitch, channels), background, np.uint8)
    cells[:count, gutter:, gutter:] = images
    joined = cells.reshape(rows, columns, *pitch, channels).swapaxes(1, 2)
    sheet = joined.reshape(rows * pitch[0], columns * pitch[1], channels)
    # A cell has its gutter above and to the left: the sheet lacks those at its end.
    edges = ((0, gutter), (0, gutter), (0, 0))
    return np.pad(sheet, edges, constant_values=background)


def split_sheet(sheet: np.ndarray, columns: int, gutter: int = 0) -> np.ndarray:
    """Return the square images of a `contact_sheet`, empty cells included.

    Args:
        sheet: (H', W', C).
        columns: images per row.
        gutter: as given to `contact_sheet`.

    Returns:
        (rows, columns, H, H, C).

    Raises:
        ValueError: the size of the sheet does not fit such images.
    """
    height, width, channels = sheet.shape
    pitch, rest = divmod(width - gutter, columns)
    rows, left = divmod(height - gutter, pitch) if pitch else (0, 1)
    if rest or left or pitch <= gutter:
        raise ValueError(
            f"an image of {width} x {height} pixels is not a sheet of {columns} columns of square "
            f"images with a gutter of {gutter}: use one that `contact_sheet` made"
        )
    cells = sheet[gutter:, gutter:].reshape(rows, pitch, columns, pitch, channels).swapaxes(1, 2)
    return cells[:, :, : pitch - gutter, : pitch - gutter]
