"""A folder of images as a set of squares: one subfolder per class, or a flat folder without classes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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


@dataclass
class _Entry:
    path: Path
    label: int


class ImageFolder:
    """Images below a folder; the names of its subfolders, sorted, are the classes.

    Raises:
        FileNotFoundError: when the folder is missing.
        ValueError: when it holds no images, or images both beside and inside subfolders.
    """

    def __init__(self, folder: str | Path, image_size: int, channels: int = 3):
        self.folder, self.image_size, self.channels = Path(folder), image_size, channels
        self.name = str(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give one with images, or with one subfolder per class")
        flat = _images_in(self.folder)
        classes = [sub for sub in sorted(self.folder.iterdir()) if sub.is_dir() and _images_below(sub)]
        if flat and classes:
            raise ValueError(
                f"{folder} holds {len(flat)} images beside {len(classes)} subfolders with images; put every image into "
                "the subfolder of its class, or all of them into one flat folder"
            )
        if not flat and not classes:
            raise ValueError(f"{folder} holds no images ({', '.join(EXTENSIONS)}), neither flat nor in subfolders")
        self.label_names = tuple(sub.name for sub in classes)
        self._entries = [_Entry(path, 0) for path in flat]
        for label, sub in enumerate(classes):
            self._entries += [_Entry(path, label) for path in _images_below(sub)]
        self._cache: dict[int, np.ndarray] | None = None
        if len(self._entries) * channels * image_size**2 <= CACHE_BYTES:
            self._cache = {}
        self._pool = ThreadPoolExecutor(max_workers=4)

    def __len__(self) -> int:
        return len(self._entries)

    def _decode(self, index: int) -> np.ndarray:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        path = self._entries[index].path
        try:
            with Image.open(path) as image:
                square = centre_crop(image.convert("L" if self.channels == 1 else "RGB"), self.image_size)
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}); mend it or take it out") from error
        pixels = np.asarray(square, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)
        pixels = pixels.transpose(2, 0, 1)
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, channels, size, size) uint8 and labels (b,) int64.

        Raises:
            ValueError: naming a file that cannot be decoded.
        """
        images = np.stack(list(self._pool.map(self._decode, indices)))
        return images, np.array([self._entries[i].label for i in indices], dtype=np.int64)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
