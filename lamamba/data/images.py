"""A folder of images as a set of squares: one subfolder per class, or a flat folder without classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from lamamba.data.check import find_images, known_bad

logger = logging.getLogger("lamamba.data")

CACHE_BYTES = 2 << 30
"""Decoded images are kept in memory when the whole set is smaller than this."""


class ImageSet(Protocol):
    """Images that all have one size, and their classes."""

    name: str
    image_size: int
    channels: int
    label_names: tuple[str, ...]
    """One name per class, in the order of the labels; empty where there are no classes."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, channels, size, size) uint8 and labels (b,) int64 (all 0 where there are no classes)."""
        ...


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square, size pixels wide, as ADM and DiT crop it.

    Halved by box filter while the short side is at least twice the size, then bicubic, then cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageFolder:
    """Images below a folder; the names of its subfolders, sorted, are the classes.

    Files that `lamamba data check` found bad are skipped. Where one turns out bad all the same, the next good image of
    the set takes its place, always the same one; too many of them end the reading.

    Args:
        folder: with images, or one subfolder of images per class.
        image_size: side in pixels that they are cropped and scaled to.
        channels: 1 for grey, 3 for colour.
        max_bad: bad files, unknown before, that are borne.

    Raises:
        FileNotFoundError: when the folder is missing.
        ValueError: when it holds no good images, or images both beside and inside subfolders.
    """

    def __init__(self, folder: str | Path, image_size: int, channels: int = 3, max_bad: int = 16):
        self.folder, self.image_size, self.channels, self.max_bad = Path(folder), image_size, channels, max_bad
        self.name = str(folder)
        paths, self.label_names, labels = find_images(self.folder)
        skipped = known_bad(self.folder)
        self._entries = [
            (path, label) for path, label in zip(paths, labels, strict=True)
            if path.relative_to(self.folder).as_posix() not in skipped
        ]
        if not self._entries:
            raise ValueError(f"{folder}: all {len(paths)} images are bad; lamamba data check {folder} says why")
        self.num_skipped = len(paths) - len(self._entries)
        self.bad: dict[Path, str] = {}
        """Files that turned out bad while they were read, with the reason."""
        self._cache: dict[int, np.ndarray] | None = None
        if len(self._entries) * channels * image_size**2 <= CACHE_BYTES:
            self._cache = {}
        self._pool = ThreadPoolExecutor(max_workers=4)

    def __len__(self) -> int:
        return len(self._entries)

    def _decode(self, index: int) -> np.ndarray | None:
        """(channels, size, size) uint8; None, and an entry in `bad`, for a file that cannot be read."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        path, _ = self._entries[index]
        if path in self.bad:
            return None
        try:
            with Image.open(path) as image:
                square = centre_crop(image.convert("L" if self.channels == 1 else "RGB"), self.image_size)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            self.bad[path] = str(error)
            logger.warning("%s cannot be read as an image (%s): another one takes its place", path, error)
            return None
        pixels = np.asarray(square, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)
        pixels = pixels.transpose(2, 0, 1)
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def _decode_or_next(self, index: int) -> tuple[np.ndarray, int]:
        """The image and label of the first good file from this one on."""
        for step in range(len(self._entries)):
            place = (index + step) % len(self._entries)
            pixels = self._decode(place)
            if pixels is not None:
                return pixels, self._entries[place][1]
            if len(self.bad) > self.max_bad:
                break
        shown = "; ".join(f"{path}: {reason}" for path, reason in list(self.bad.items())[:5])
        raise ValueError(
            f"{len(self.bad)} images cannot be read, more than the {self.max_bad} that are borne ({shown}); "
            f"run lamamba data check {self.folder}, and the bad ones will be skipped"
        )

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, channels, size, size) uint8 and labels (b,) int64.

        Raises:
            ValueError: naming files, when more than `max_bad` cannot be decoded.
        """
        images, labels = zip(*self._pool.map(self._decode_or_next, indices), strict=True)
        return np.stack(images), np.array(labels, dtype=np.int64)
