"""Grids of images as one picture, and PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lamamba.data.images import MAX_PIXELS
from lamamba.utils.files import replacing

CELL_PIXELS = 48
"""Small images are enlarged (bicubic, which eyes read far better than blocks) until a cell is about this wide."""
GAP, BACKGROUND, INK = 6, 255, 60


def check_grid(count: int, height: int, width: int, advice: str) -> None:
    """Check before any work that a grid of so many images can be opened again; `advice` ends the message.

    Raises:
        ValueError: when it would have more pixels than Pillow opens.
    """
    if count * max(height, CELL_PIXELS) * max(width, CELL_PIXELS) > MAX_PIXELS:
        raise ValueError(f"{count:,} images of {height} x {width} pixels are too many for one picture{advice}")


def grid_picture(
    images: np.ndarray, columns: int, row_names: Sequence[str] = (), *, cell_pixels: int = CELL_PIXELS,
    crisp: bool = False,
) -> Image.Image:
    """Images in a table, row by row, with gaps between them and names to the left of the rows.

    Args:
        images: (n, h, w, c) uint8, one or three channels.
        columns: images in a row.
        row_names: one name per row, or none.
        cell_pixels: images smaller than this are enlarged by a whole factor, to about this width.
        crisp: enlarge to nearest neighbours (every pixel a square) instead of bicubically.
    """
    count, height, width, _ = images.shape
    factor = max(1, cell_pixels // max(height, width))
    scaling = Image.Resampling.NEAREST if crisp else Image.Resampling.BICUBIC
    height, width = height * factor, width * factor
    rows = -(-count // columns)
    font = ImageFont.load_default(size=max(12, min(height // 3, 24)))
    margin = round(max((font.getlength(name) for name in row_names), default=-2 * GAP)) + 2 * GAP
    shape = (rows * (height + GAP) + GAP, margin + columns * (width + GAP) + GAP)
    canvas = np.full((*shape, 3), BACKGROUND, dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = GAP + k // columns * (height + GAP), margin + GAP + k % columns * (width + GAP)
        enlarged = np.asarray(bare_picture(image).resize((width, height), scaling))
        canvas[top : top + height, left : left + width] = enlarged.reshape(height, width, -1)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(row_names):
        middle = GAP + row * (height + GAP) + height / 2
        draw.text((margin - GAP, middle), name, fill=(INK, INK, INK), font=font, anchor="rm")
    return picture


def bare_picture(image: np.ndarray) -> Image.Image:
    """One uint8 image (h, w, c) as a PIL image, unscaled."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_picture(picture: Image.Image, path: Path, text: PngImagePlugin.PngInfo | None = None) -> None:
    """Write a PNG with text chunks, atomically: a failure leaves no partial file."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)
