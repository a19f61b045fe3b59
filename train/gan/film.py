"""Image grids, interpolations between latents, and the film of a training run."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.images import contact_sheet, png, split_sheet, to_pixels
from models.latents import walk

GRID_ROWS, GRID_COLUMNS = 10, 10
GUTTER = 2  # pixels between the images of a grid
FRAMES = 8  # rows of a film at most

GRAY = 128  # level between the images of a grid
PAPER, INK = (255, 255, 255), (40, 40, 40)
CELL = 64  # pixels that the images of a film are enlarged to, by whole factors
MARGIN = 84  # pixels left of a film's images, for the steps


def grid(images: Tensor, columns: int) -> np.ndarray:
    """Draw images row by row, with gray lines between them.

    Args:
        images: (N, C, H, W) in [-1, 1]; grayscale (C = 1) or color (C = 3).
        columns: images per row.

    Returns:
        (rows, width, 3) uint8; image i is in row i // columns, column i % columns.
    """
    # NaN, which a diverged generator draws, has no conversion to a level: it is black.
    finite = images.detach().float().nan_to_num(nan=-1, posinf=1, neginf=-1)
    colored = finite.expand(-1, 3, -1, -1).cpu().numpy()
    return contact_sheet(to_pixels(colored), columns, GUTTER, GRAY)


# ---- between latents


def interpolations(latents: Tensor, steps: int) -> Tensor:
    """Interpolate from each latent to the next, and from the last to the first.

    Args:
        latents: (N, Z).
        steps: points of an interpolation, both ends included; at least 2.

    Returns:
        (N * steps, Z): each interpolation is a row of `grid(..., columns=steps)`.
    """
    ends = latents.cpu().numpy()
    points = walk(ends, np.roll(ends, -1, axis=0), steps)  # (steps, N, Z)
    return torch.from_numpy(points).to(latents.device).transpose(0, 1).flatten(0, 1)


# ---- the film of a training run


def select_steps(steps: Sequence[int], count: int = FRAMES) -> list[int]:
    """Select at most `count` steps, spaced geometrically, the first and the last among them.

    Images change the most early in training.
    """
    ordered = sorted(steps)
    if len(ordered) <= count:
        return ordered

    def nearest(target: float) -> int:
        return min(ordered, key=lambda step: abs(math.log(max(step, 1) / target)))

    targets = np.geomspace(max(ordered[0], 1), ordered[-1], count)
    return sorted({ordered[0], ordered[-1], *map(nearest, targets)})


def film(
    frames: Sequence[tuple[int, np.ndarray]],
    class_names: Sequence[str] | None = None,
    real: np.ndarray | None = None,
) -> bytes:
    """Draw a training run as one image: a row of the same latents for each step.

    Args:
        frames: (step, grid of `GRID_COLUMNS` columns) in the order of the rows, all grids drawn
            from the same latents.
        class_names: of a conditional generator, whose grids have one row per class: the film shows
            one image of each class below its name, or without names where the sequence is empty.
            None: the film shows a grid's first row.
        real: a grid of real images in the same layout, for a last row.

    Returns:
        A PNG.
    """
    conditional = class_names is not None
    rows = [(f"step {step:,}", _select_images(drawn, conditional)) for step, drawn in frames]
    if real is not None:
        rows.append(("real", _select_images(real, conditional)))
    columns, side = rows[0][1].shape[:2]
    scale = max(1, round(CELL / side))
    pitch = scale * side + GUTTER
    head = _draw_names((class_names or [])[:columns], pitch)
    tops = [
        head.height + number * pitch + (8 if label == "real" else 0)
        for number, (label, _) in enumerate(rows)
    ]
    canvas = Image.new("RGB", (MARGIN + columns * pitch, tops[-1] + pitch), PAPER)
    canvas.paste(head, (MARGIN, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for top, (label, images) in zip(tops, rows, strict=True):
        draw.text((MARGIN - 10, top + pitch // 2), label, INK, font, anchor="rm")
        for column, image in enumerate(images):
            size = (scale * side, scale * side)
            enlarged = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
            canvas.paste(enlarged, (MARGIN + column * pitch, top))
    return png(canvas)


def _select_images(drawn: np.ndarray, conditional: bool) -> np.ndarray:
    """Return the images (N, H, W, 3) of a grid that the film shows."""
    images = split_sheet(drawn, GRID_COLUMNS, GUTTER)
    return images[:, 0] if conditional else images[0]


def _draw_names(names: Sequence[str], pitch: int) -> Image.Image:
    """Draw the classes' names, each centered over its column, in as many lines as it needs."""
    font = ImageFont.load_default(11)
    wrapped = [_wrap(name, font, pitch - 4) for name in names]
    lines = max((len(words) for words in wrapped), default=0)
    head = Image.new("RGB", (max(1, len(names)) * pitch, 14 * lines + 6), PAPER)
    draw = ImageDraw.Draw(head)
    for column, words in enumerate(wrapped):
        draw.multiline_text(
            (column * pitch + pitch // 2, head.height - 4),
            "\n".join(words),
            INK,
            font,
            anchor="md",
            spacing=2,
            align="center",
        )
    return head


def _wrap(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in name.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
