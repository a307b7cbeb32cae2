"""Between pictures (uint8, 0 .. 255) and what the network reads (float, about -1 .. 1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class PixelCodec:
    """Pixels themselves, scaled to [-1, 1]: one pixel is one input pixel of the network."""

    scale = 1

    def encode(self, images: np.ndarray, mirror: np.ndarray | None = None) -> Tensor:
        """uint8 images (b, c, h, w), some mirrored left to right (b,) bool, to float32 x0 in [-1, 1]."""
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        if mirror is not None:
            flags = torch.from_numpy(mirror).view(-1, 1, 1, 1)
            pixels = torch.where(flags, pixels.flip(-1), pixels)
        return pixels.float() / 127.5 - 1

    def decode(self, x0: Tensor) -> np.ndarray:
        """x0 (b, c, h, w) to uint8 images (b, h, w, c), cut off rather than rounded, as the field's protocol has it."""
        levels = (127.5 * x0.float() + 128).clamp(0, 255).to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()
