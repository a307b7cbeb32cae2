"""Every random number of a training sample, as a function of the run's seed and the sample's position in the run.

So neither a restart nor the world size changes a run. Position k b + i is sample i of batch k, of b samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_SAMPLE, _ORDER, _HELD_OUT, _SPLIT = 1, 2, 3, 4
"""Independent random streams of a seed."""


def _generator(seed: int, stream: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, position, 0]))


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of b samples."""

    time: Tensor
    """(b,) uniform: the quantile of the timestep."""
    label: Tensor
    """(b,) uniform: whether the label is dropped."""
    mirror: np.ndarray
    """(b,) bool: whether the image is mirrored."""
    eps: Tensor
    """(b, c, h, w) standard normal noise."""
    crop: np.ndarray
    """(b, 3) uniform: how much a random crop shows, and where it begins, from the top and from the left."""
    flow_map: Tensor
    """(b, 6) uniform: which times at the ends of their ranges, the second time, the guidance scale, and whose x_t."""
    latent: Tensor | None = None
    """(b, c, h, w) standard normal: the draw from an autoencoder's posterior; None where it was not requested."""


def draw(
    seed: int, positions: Sequence[int], shape: tuple[int, ...], *, latent: bool = False, held_out: bool = False
) -> Draws:
    """Random numbers of the samples at these positions in the run.

    A latent draw changes none of the others. Held-out images have a stream of their own.

    Args:
        seed: of the run.
        positions: of the b samples.
        shape: (c, h, w) of one sample.
        latent: whether to draw from an autoencoder's posterior, too.
        held_out: whether positions are those of held-out images.
    """
    time, label, mirror, eps, crop, posterior, flow_map = [], [], [], [], [], [], []
    for position in positions:
        generator = _generator(seed, _HELD_OUT if held_out else _SAMPLE, position)
        uniform = generator.random(3)
        time.append(uniform[0])
        label.append(uniform[1])
        mirror.append(uniform[2] < 0.5)
        eps.append(generator.standard_normal(shape, dtype=np.float32))
        crop.append(generator.random(3))
        if latent:
            posterior.append(generator.standard_normal(shape, dtype=np.float32))
        flow_map.append(generator.random(6))                                    # last: the others are as they were
    return Draws(
        torch.tensor(time), torch.tensor(label), np.array(mirror), torch.from_numpy(np.stack(eps)), np.stack(crop),
        torch.from_numpy(np.stack(flow_map)), torch.from_numpy(np.stack(posterior)) if latent else None,
    )


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return _generator(seed, _ORDER, epoch).permutation(size)


def image_indices(seed: int, positions: Sequence[int], size: int) -> list[int]:
    """Index of the image at each position: every epoch of `size` positions is a new permutation of all images."""
    return [int(_order(seed, position // size, size)[position % size]) for position in positions]


def split_held_out(seed: int, size: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on, and of the held-out ones, by the seed alone.

    Raises:
        ValueError: when nothing would be left to train on.
    """
    if held_out >= size:
        raise ValueError(f"watch.held_out={held_out} leaves nothing of {size} images to train on; hold out fewer")
    order = _generator(seed, _SPLIT, 0).permutation(size) if held_out else np.arange(size)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
