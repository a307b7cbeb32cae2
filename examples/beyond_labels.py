"""More than a picture of a label: image-to-image, inpainting and variations, by the digits model of the package.

    pip install 'lamamba-diff[digits]'
    python examples/beyond_labels.py --out docs

writes image-to-image.png, inpainting.png and variations.png. Every image has a generator of its own, so that it depends
on nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lamamba import LaMambaPipeline
from lamamba.data.digits import Digits
from lamamba.diffusion.denoise import make_scheduler
from lamamba.pretrained import shipped_model
from lamamba.runs.model import open_network
from lamamba.viz.grids import grid_picture

Row = tuple[str, list[Image.Image]]
"""Its name, and its pictures."""


def open_pipeline() -> LaMambaPipeline:
    """The digits model of the package; for one of your own, LaMambaPipeline.from_pretrained does it."""
    network, facts = open_network(shipped_model())
    pipe = LaMambaPipeline(
        network, vae=None, scheduler=make_scheduler("flow-euler", "flow"), id2label=dict(enumerate(facts.label_names)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(first, first + count)]


def real_digit(digits: Digits, label: int, number: int) -> Image.Image:
    """The number-th real digit of a class."""
    return Image.fromarray(digits.images[np.flatnonzero(digits.labels == label)[number], 0])


def image_to_image(pipe: LaMambaPipeline, digits: Digits) -> list[Row]:
    """A real digit, noised and drawn again as another one: the more steps are done, the less of it stays."""
    rows = []
    for label, number, wanted in ((1, 3, "4"), (3, 0, "8"), (9, 5, "7")):
        real = real_digit(digits, label, number)
        drawn = [
            pipe(wanted, image=real, strength=strength, num_inference_steps=40, generator=seeds(number, 1)).images[0]
            for strength in (0.3, 0.5, 0.6, 0.7, 0.8, 1.0)
        ]
        rows.append((f"{label} to {wanted}", [real, *drawn]))
    return rows


def inpainting(pipe: LaMambaPipeline, digits: Digits) -> list[Row]:
    """The lower half of a real digit is drawn anew, as the classes asked for."""
    mask = Image.fromarray(np.repeat(np.array([0] * 4 + [255] * 4, dtype=np.uint8)[:, None], 8, axis=1))
    rows = []
    for label, number, wanted in ((5, 1, "5599"), (7, 2, "7799"), (0, 4, "0099")):
        real = real_digit(digits, label, number)
        left = Image.composite(Image.new("L", real.size, 128), real, mask)
        drawn = pipe(
            list(wanted), image=real, mask_image=mask, num_inference_steps=40, generator=seeds(0, len(wanted))
        ).images
        rows.append((f"as {', '.join(wanted)}", [real, left, *drawn]))
    return rows


def variations(pipe: LaMambaPipeline) -> list[Row]:
    """One seed's picture, then pictures whose noise moves away from it towards another seed's."""
    rows = []
    for label, seed in (("2", 1), ("5", 8), ("3", 2)):
        drawn = [
            pipe(label, generator=seeds(seed, 1), variation_generator=seeds(100 + seed, 1),
                 variation_strength=strength).images[0]
            for strength in (0, 0.1, 0.2, 0.3, 0.4, 0.6, 1)
        ]
        rows.append((label, drawn))
    return rows


def save(rows: list[Row], path: Path) -> None:
    pictures = np.stack([np.asarray(picture)[..., None] for _, pictures in rows for picture in pictures])
    grid_picture(pictures, len(rows[0][1]), [name for name, _ in rows], cell_pixels=64).save(path)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    chosen = parser.parse_args()
    pipe, digits = open_pipeline(), Digits()
    chosen.out.mkdir(parents=True, exist_ok=True)
    save(image_to_image(pipe, digits), chosen.out / "image-to-image.png")
    save(inpainting(pipe, digits), chosen.out / "inpainting.png")
    save(variations(pipe), chosen.out / "variations.png")


if __name__ == "__main__":
    main()
