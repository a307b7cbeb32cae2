"""Pictures one after another: GIF through Pillow, MP4 through imageio and ffmpeg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lamamba.utils.files import settle, temporary_name
from lamamba.viz.grids import BACKGROUND

FILM_SUFFIXES = (".gif", ".mp4")
MAX_FRAMES = 100
"""More steps than that, and a film shows some of them, evenly spaced, the last among them."""
HOLD_SECONDS = 1.5
"""For which the last picture of a film stays."""


def chosen_frames(steps: int, most: int = MAX_FRAMES) -> list[int]:
    """Which of the steps 1 .. steps a film shows."""
    return sorted({round(k) for k in np.linspace(1, steps, min(steps, most))})


def check_film(path: Path) -> None:
    """Refuse before any work what could not be written in the end.

    Raises:
        RuntimeError: when what MP4 needs is not installed.
    """
    if path.suffix.lower() == ".mp4":
        _imageio()


def save_film(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    """Write a film; the last picture stays for a while. Nothing half written is left by a failure.

    Raises:
        RuntimeError: when what MP4 needs is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path).with_suffix(path.suffix.lower())
    try:
        if path.suffix.lower() == ".gif":
            _save_gif(frames, temporary, frames_per_second)
        else:
            _save_mp4(frames, temporary, frames_per_second)
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_gif(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    # one palette for all, from the last: else colours flicker
    palette = frames[-1].convert("RGB").quantize(256, dither=Image.Dither.NONE)
    grey = all(_is_grey(frame) for frame in (frames[0], frames[-1]))
    drawn = [
        frame.convert("L") if grey else frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    each = max(20, round(1000 / frames_per_second))                             # players take less for a mistake
    durations = [each] * (len(drawn) - 1) + [each + round(1000 * HOLD_SECONDS)]
    drawn[0].save(path, format="GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0)


def _is_grey(picture: Image.Image) -> bool:
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    return bool((np.ptp(pixels, axis=2) == 0).all())


def _save_mp4(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    imageio = _imageio()
    hold = round(HOLD_SECONDS * frames_per_second)
    with imageio.get_writer(path, fps=frames_per_second, codec="libx264", quality=8, macro_block_size=2) as writer:
        for frame in [*frames, *[frames[-1]] * hold]:
            writer.append_data(_even(np.asarray(frame.convert("RGB"))))


def _even(pixels: np.ndarray) -> np.ndarray:
    """Sides that the format takes."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=BACKGROUND)


def _imageio():
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise RuntimeError("MP4 needs imageio and ffmpeg: pip install 'lamamba-diff[film]', or give a .gif") from error
    imageio_ffmpeg.get_ffmpeg_exe()
    return imageio
