"""The 1,797 real handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak, 1998): 8 x 8 pixels, 17 grey levels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

SIDE = 8
GREY_LEVELS = 16


class Digits:
    """The digits as an image set, each pixel repeated where image_size is a larger multiple of 8.

    Raises:
        RuntimeError: when scikit-learn is not installed.
        ValueError: for an image size that is not a multiple of 8.
    """

    name = "digits"
    channels = 1
    label_names = tuple("0123456789")

    def __init__(self, image_size: int = SIDE):
        if image_size < SIDE or image_size % SIDE:
            raise ValueError(f"image_size={image_size}: the digits are {SIDE} x {SIDE}; choose a multiple of {SIDE}")
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise RuntimeError("the digits come with scikit-learn: pip install 'lamamba-diff[digits]'") from error
        levels, labels = load_digits(return_X_y=True)
        self._small = np.round(levels.reshape(-1, 1, SIDE, SIDE) * (255 / GREY_LEVELS)).astype(np.uint8)
        self.image_size = image_size
        self.labels = labels.astype(np.int64)

    @functools.cached_property
    def images(self) -> np.ndarray:
        """All of them, (1797, 1, size, size) uint8."""
        return self._enlarged(self._small)

    def _enlarged(self, images: np.ndarray) -> np.ndarray:
        factor = self.image_size // SIDE
        return images.repeat(factor, axis=2).repeat(factor, axis=3)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, 1, size, size) uint8 and labels (b,) int64."""
        chosen = np.asarray(indices)
        return self._enlarged(self._small[chosen]), self.labels[chosen]
