"""Between pictures (uint8, 0 .. 255) and what the network reads (float, about -1 .. 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


def to_grey_levels(x: Tensor) -> np.ndarray:
    """Pixels (b, c, h, w) in [-1, 1] to uint8 (b, h, w, c), cut off rather than rounded: the field's protocol."""
    levels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


class Decoder(Protocol):
    """What sampling needs of a codec."""

    def decode(self, x0: Tensor) -> np.ndarray:
        """The network's clean output (b, c, h, w) as uint8 images (b, H, W, channels)."""
        ...


class PixelCodec:
    """Pixels themselves, scaled to [-1, 1]: one pixel of the image is one pixel of the network's input."""

    def encode(self, images: np.ndarray, mirror: np.ndarray | None = None) -> Tensor:
        """uint8 images (b, c, h, w), some mirrored left to right (b,) bool, to float32 x0 in [-1, 1]."""
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        if mirror is not None:
            flags = torch.from_numpy(mirror).view(-1, 1, 1, 1)
            pixels = torch.where(flags, pixels.flip(-1), pixels)
        return pixels.float() / 127.5 - 1

    def decode(self, x0: Tensor) -> np.ndarray:
        return to_grey_levels(x0)


class LatentDecoder:
    """Latents through a diffusers AutoencoderKL, from a folder or a hub id such as stabilityai/sd-vae-ft-ema.

    Raises:
        OSError: when there is no such autoencoder.
    """

    def __init__(self, autoencoder: str | Path, scale: float, device: torch.device | str = "cpu"):
        from diffusers import AutoencoderKL

        self.scale = scale
        self.autoencoder = AutoencoderKL.from_pretrained(autoencoder).to(device).eval()

    @torch.no_grad()
    def decode(self, x0: Tensor) -> np.ndarray:
        # one at a time: the decoder's activations are far larger than the network's
        return np.concatenate([to_grey_levels(self.autoencoder.decode(x / self.scale).sample) for x in x0.split(1)])
