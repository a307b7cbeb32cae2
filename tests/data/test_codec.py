"""Pixels to uint8: clamped and truncated as in ADM's evaluation, not rounded."""

from __future__ import annotations

import numpy as np
import torch

from lamamba.data.codec import to_pixels, to_uint8


def test_values_are_truncated_and_not_rounded():
    wanted = {-3.0: 0, -1.0: 0, -0.9882: 2, 0.0: 128, 0.007: 128, 0.0079: 129, 0.996: 254, 1.0: 255, 9.0: 255}
    levels = to_uint8(torch.tensor(list(wanted)).view(1, 1, 1, -1))
    assert (levels.dtype, levels.shape) == (np.uint8, (1, 1, len(wanted), 1))
    for value, level, found in zip(wanted, wanted.values(), levels.ravel().tolist(), strict=True):
        assert found == level == int(min(max(127.5 * value + 128, 0), 255)), value


def test_every_uint8_value_is_recovered():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = to_pixels(every.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(to_uint8(pixels), every)
