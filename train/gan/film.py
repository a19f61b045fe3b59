"""Pictures put side by side: grids, walks through the latent space, and the film of a training."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.latents import walk

GRID_ROWS, GRID_COLUMNS = 10, 10
GUTTER = 2  # pixels between the pictures of a grid
FRAMES = 8  # rows of a film at most

PAPER, INK, RULE = (255, 255, 255), (40, 40, 40), (128, 128, 128)
CELL = 64  # what a picture in a film is enlarged to, by whole factors
MARGIN = 84  # left of a film's pictures: the steps


def grid(images: Tensor, columns: int) -> np.ndarray:
    """Pictures row by row, grey lines between them.

    Args:
        images: (N, C, H, W) in [-1, 1]; grey (C = 1) or colour (C = 3).
        columns: pictures a row.

    Returns:
        (rows, width, 3) uint8; picture i is in row i // columns, column i % columns.
    """
    pixels = (
        ((images.detach().float().clamp(-1, 1) + 1) * 127.5)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )
    height, width = (size + GUTTER for size in pixels.shape[1:3])
    sheet = np.full(
        (math.ceil(len(pixels) / columns) * height + GUTTER, columns * width + GUTTER, 3),
        RULE,
        np.uint8,
    )
    for index, picture in enumerate(pixels):
        top, left = index // columns * height + GUTTER, index % columns * width + GUTTER
        sheet[top : top + height - GUTTER, left : left + width - GUTTER] = picture
    return sheet


def cells(sheet: np.ndarray, columns: int) -> np.ndarray:
    """The pictures of a `grid` again, (rows, columns, H, W, 3); all are as high as wide.

    Raises:
        ValueError: the picture is no such grid.
    """
    size, rest = divmod(sheet.shape[1] - GUTTER, columns)
    rows, left = divmod(sheet.shape[0] - GUTTER, size) if size else (0, 1)
    if rest or left or size <= GUTTER:
        raise ValueError(
            f"a picture of {sheet.shape[1]} x {sheet.shape[0]} pixels is no grid of {columns} columns: draw it by `grid`"
        )
    return (
        sheet[GUTTER:, GUTTER:]
        .reshape(rows, size, columns, size, 3)
        .swapaxes(1, 2)[:, :, : size - GUTTER, : size - GUTTER]
    )


# ---------------------------------------------------------------- between latents


def interpolations(latents: Tensor, steps: int) -> Tensor:
    """Walks from each latent to the next, and from the last to the first: one row of `grid(..., columns=steps)` each.

    Args:
        latents: (N, Z).
        steps: points of a walk, both ends included; at least 2.

    Returns:
        (N * steps, Z).
    """
    ends = latents.cpu().numpy()
    walks = walk(ends, np.roll(ends, -1, axis=0), steps)  # (steps, N, Z)
    return torch.from_numpy(walks).to(latents.device).transpose(0, 1).flatten(0, 1)


# ---------------------------------------------------------------- the film of a training


def select_steps(steps: Sequence[int], count: int = FRAMES) -> list[int]:
    """At most `count` of the steps, the first and the last among them, ever further apart: training does most at its beginning."""
    ordered = sorted(steps)
    if len(ordered) <= count:
        return ordered
    wanted = np.geomspace(max(ordered[0], 1), ordered[-1], count)
    return sorted(
        {
            ordered[0],
            ordered[-1],
            *(
                min(ordered, key=lambda step: abs(math.log(max(step, 1) / target)))
                for target in wanted
            ),
        }
    )


def film(
    frames: Sequence[tuple[int, np.ndarray]],
    class_names: Sequence[str] | None = None,
    real: np.ndarray | None = None,
) -> bytes:
    """A training as a strip, a PNG: one row a step, in each the same latents, and real pictures below them.

    Args:
        frames: (step, grid of `GRID_COLUMNS` columns), each drawn from the same latents; in the order of their rows.
        class_names: of a conditional generator, whose grids have one row a class: one picture of each is shown, below its name
            if that is known. None: a grid's first row is shown.
        real: a grid of the same layout of real pictures.
    """
    rows = [(f"step {step:,}", _shown(sheet, class_names is not None)) for step, sheet in frames]
    if real is not None:
        rows.append(("real", _shown(real, class_names is not None)))
    side = rows[0][1].shape[1]
    scale = max(1, round(CELL / side))
    pitch = scale * side + GUTTER
    columns = len(rows[0][1])
    head = _head((class_names or [])[:columns], pitch)
    below = [
        head.height + number * pitch + (8 if label == "real" else 0)
        for number, (label, _) in enumerate(rows)
    ]
    sheet = Image.new("RGB", (MARGIN + columns * pitch, below[-1] + pitch), PAPER)
    sheet.paste(head, (MARGIN, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for top, (label, pictures) in zip(below, rows, strict=True):
        draw.text((MARGIN - 10, top + pitch // 2), label, INK, font, anchor="rm")
        for column, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize(
                (scale * side, scale * side), Image.Resampling.NEAREST
            )
            sheet.paste(large, (MARGIN + column * pitch, top))
    return png(sheet)


def _shown(sheet: np.ndarray, conditional: bool) -> np.ndarray:
    """(N, H, W, 3): what a film shows of a grid."""
    pictures = cells(sheet, GRID_COLUMNS)
    return pictures[:, 0] if conditional else pictures[0]


def _head(names: Sequence[str], pitch: int) -> Image.Image:
    """The classes' names above their columns, in as many lines as they need."""
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
            "md",
            2,
            "center",
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


def png(picture: np.ndarray | Image.Image) -> bytes:
    """A picture, (H, W) or (H, W, 3) uint8 or Pillow's, as the bytes of a PNG."""
    drawn = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return file.getvalue()
