"""Every random number of a training sample, as a function of the run's seed and the sample's place in the run.

So neither a restart nor the number of processes changes a run: sample 4711 has its noise wherever it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_SAMPLE, _ORDER = 1, 2
"""Streams of numbers that never meet."""


def _generator(seed: int, stream: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, place, 0]))


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of b samples."""

    time: Tensor
    """(b,) uniform: how noisy."""
    label: Tensor
    """(b,) uniform: whether the label is dropped."""
    mirror: np.ndarray
    """(b,) bool: whether the image is mirrored."""
    eps: Tensor
    """(b, c, h, w) standard normal noise."""


def draw(seed: int, places: Sequence[int], shape: tuple[int, ...]) -> Draws:
    """The numbers of the samples at these places in the run; shape is one image's (c, h, w)."""
    time, label, mirror, eps = [], [], [], []
    for place in places:
        generator = _generator(seed, _SAMPLE, place)
        uniform = generator.random(3)
        time.append(uniform[0])
        label.append(uniform[1])
        mirror.append(uniform[2] < 0.5)
        eps.append(generator.standard_normal(shape, dtype=np.float32))
    return Draws(torch.tensor(time), torch.tensor(label), np.array(mirror), torch.from_numpy(np.stack(eps)))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return _generator(seed, _ORDER, epoch).permutation(size)


def image_indices(seed: int, places: Sequence[int], size: int) -> list[int]:
    """Which image stands at each place: every epoch of `size` places is a fresh shuffle of all images."""
    return [int(_order(seed, place // size, size)[place % size]) for place in places]
