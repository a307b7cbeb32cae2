"""Pictures for people: grids of samples and training curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL_PIXELS = 48
"""Small images are enlarged (bicubic, which eyes read far better than blocks) until a cell is about this wide."""
GAP, BACKGROUND, INK = 6, 255, 60


def grid_picture(images: np.ndarray, columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """uint8 images (n, h, w, c) as a table with gaps, row by row; small ones enlarged, rows named on the left."""
    count, height, width, channels = images.shape
    factor = max(1, CELL_PIXELS // max(height, width))
    height, width = height * factor, width * factor
    rows = -(-count // columns)
    font = ImageFont.load_default(size=max(12, min(height // 3, 24)))
    margin = round(max((font.getlength(name) for name in row_names), default=-2 * GAP)) + 2 * GAP
    shape = (rows * (height + GAP) + GAP, margin + columns * (width + GAP) + GAP)
    canvas = np.full((*shape, 3), BACKGROUND, dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = GAP + k // columns * (height + GAP), margin + GAP + k % columns * (width + GAP)
        cell = Image.fromarray(image if channels == 3 else image[..., 0])
        enlarged = np.asarray(cell.resize((width, height), Image.Resampling.BICUBIC))
        canvas[top : top + height, left : left + width] = enlarged.reshape(height, width, -1)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(row_names):
        middle = GAP + row * (height + GAP) + height / 2
        draw.text((margin - GAP, middle), name, fill=(INK, INK, INK), font=font, anchor="rm")
    return picture


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG so that a failure leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)


def loss_curve(metrics: Path, path: Path) -> None:
    """Draw the loss and the gradient norm of a run's metrics.jsonl over its steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1))
    top.plot(steps, [line["loss"] for line in lines], color="#1f6fb4")
    top.set(ylabel="loss", title="training loss")
    bottom.plot(steps, [line["grad_norm"] for line in lines], color="#b4641f")
    bottom.set(ylabel="gradient norm", xlabel="optimizer step", yscale="log")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
