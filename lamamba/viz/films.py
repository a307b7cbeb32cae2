"""Sequences of pictures as films: GIF through Pillow, MP4 through imageio and ffmpeg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lamamba.utils.files import replacing
from lamamba.viz.grids import BACKGROUND

FILM_SUFFIXES = (".gif", ".mp4")
MAX_FRAMES = 100
"""A film of more steps shows some of them, evenly spaced, the last included."""
HOLD_SECONDS = 1.5
"""Duration of the last picture."""


def chosen_frames(steps: int) -> list[int]:
    """Which of the steps 1 .. steps a film shows."""
    return sorted({round(k) for k in np.linspace(1, steps, min(steps, MAX_FRAMES))})


def check_film(path: Path) -> None:
    """Refuse a film that could not be written in the end, before any work.

    Raises:
        RuntimeError: when what MP4 needs is not installed.
    """
    if path.suffix.lower() == ".mp4":
        _imageio()


def save_film(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    """Write a film whose last picture stays for HOLD_SECONDS. A failure leaves no partial file.

    Raises:
        RuntimeError: when what MP4 needs is not installed.
    """
    with replacing(path, path.suffix.lower()) as temporary:
        if path.suffix.lower() == ".gif":
            _save_gif(frames, temporary, frames_per_second)
        else:
            _save_mp4(frames, temporary, frames_per_second)


def _save_gif(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    # one palette for all frames, of the last one: with one each, colours flicker
    palette = frames[-1].convert("RGB").quantize(256, dither=Image.Dither.NONE)
    grey = all(_is_grey(frame) for frame in (frames[0], frames[-1]))
    drawn = [
        frame.convert("L") if grey else frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    each = max(20, round(1000 / frames_per_second))                             # players slow shorter ones down
    durations = [each] * (len(drawn) - 1) + [each + round(1000 * HOLD_SECONDS)]
    drawn[0].save(path, format="GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0)


def _is_grey(picture: Image.Image) -> bool:
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    return bool((np.ptp(pixels, axis=2) == 0).all())


def _save_mp4(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    settings = {"fps": frames_per_second, "codec": "libx264", "quality": 8, "macro_block_size": 2}
    with _imageio().get_writer(path, **settings) as writer:
        for frame in [*frames, *[frames[-1]] * round(HOLD_SECONDS * frames_per_second)]:
            writer.append_data(_even(np.asarray(frame.convert("RGB"))))


def _even(pixels: np.ndarray) -> np.ndarray:
    """Padded to even sides, which H.264 needs."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=BACKGROUND)


def _imageio() -> Any:
    """imageio with an ffmpeg: the extra "film"."""
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise RuntimeError("MP4 needs imageio and ffmpeg: pip install 'lamamba-diff[film]', or give a .gif") from error
    imageio_ffmpeg.get_ffmpeg_exe()
    return imageio
