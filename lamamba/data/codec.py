"""Codecs between uint8 images and network inputs x0: pixels in [-1, 1], or latents of an autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lamamba.data.autoencoder import Autoencoder
from lamamba.options.base import from_dict, record
from lamamba.utils.text import shown

MAX_SCALE = 1e6
"""Of latents: more, or less than 1 in so many, is a mistake, or a damaged file."""


def check_pixels(x: Tensor, maker: str = "sampling") -> Tensor:
    """Pixels (b, c, h, w), unchanged.

    Raises:
        FloatingPointError: when they are not finite: they would become black pictures.
    """
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise FloatingPointError(
            f"{maker} made NaN or infinities of {bad} of {len(x)} pictures: compute in float32 or bfloat16, and look "
            "at the weights and the guidance scale"
        )
    return x


def to_uint8(x: Tensor) -> np.ndarray:
    """Pixels (b, c, h, w) in [-1, 1] to uint8 (b, h, w, c): 127.5 x + 128, clamped, truncated (ADM's protocol).

    Raises:
        FloatingPointError: when they are not finite.
    """
    check_pixels(x)
    levels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: np.ndarray, mirror: np.ndarray | None = None) -> Tensor:
    """uint8 images (b, c, h, w) to float32 pixels in [-1, 1], flipped left to right where mirror (b,) bool is true."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if mirror is not None:
        flags = torch.from_numpy(mirror).view(-1, 1, 1, 1)
        pixels = torch.where(flags, pixels.flip(-1), pixels)
    return pixels.float() / 127.5 - 1


@record
class CodecConfig:
    """How x0 is made of pixels or latents, and so how to decode it.

    Raises:
        ValueError: for a scale of 0, or numbers that do not go together.
    """

    codec: Literal["pixels", "latents"] = "pixels"
    """"pixels" (scaled to [-1, 1]) or "latents" (of an autoencoder)."""
    scale: float = 1.0
    """x0 = (latents - shift) * scale; 1 for pixels."""
    shift: float = 0.0
    """See scale."""
    latents_mean: tuple[float, ...] = ()
    """Of each channel; with latents_std, x0 = (latents - latents_mean) / latents_std * scale. Few autoencoders have
    it."""
    latents_std: tuple[float, ...] = ()
    """See latents_mean."""
    autoencoder: str | None = None
    """The autoencoder by folder or hub id."""
    autoencoder_sha256: str | None = None
    """Of its weights and configuration."""

    def __post_init__(self) -> None:
        if abs(self.shift) > MAX_SCALE or not 1 / MAX_SCALE <= (abs(self.scale) or 1) <= MAX_SCALE:
            raise ValueError(
                f"scale={self.scale:g} and shift={self.shift:g} are those of no autoencoder: scale lies in "
                f"{1 / MAX_SCALE:g} .. {MAX_SCALE:g}, shift is no larger"
            )
        if any(abs(mean) > MAX_SCALE for mean in self.latents_mean) or any(
                not 1 / MAX_SCALE <= (abs(std) or 1) <= MAX_SCALE for std in self.latents_std):
            raise ValueError(
                f"latents_mean={shown(self.latents_mean)} and latents_std={shown(self.latents_std)} are those of no "
                f"autoencoder: deviations lie in {1 / MAX_SCALE:g} .. {MAX_SCALE:g}, means are no larger"
            )
        if not self.scale or 0 in self.latents_std or len(self.latents_mean) != len(self.latents_std):
            raise ValueError(
                f"scale={self.scale}, latents_mean={self.latents_mean} and latents_std={self.latents_std} decode "
                "nothing: scale and latents_std must not be 0, and latents_mean and latents_std have a number for each "
                "channel"
            )

    @classmethod
    def of(cls, autoencoder: Autoencoder) -> CodecConfig:
        """From a loaded autoencoder."""
        config = cls.of_config(autoencoder.config)
        return dataclasses.replace(config, autoencoder=autoencoder.name, autoencoder_sha256=autoencoder.sha256)

    @classmethod
    def of_config(cls, values: Mapping[str, Any]) -> CodecConfig:
        """From an autoencoder's configuration; name and hash stay None.

        Raises:
            ValueError: for entries that are no numbers.
        """
        return from_dict(CodecConfig, {
            "codec": "latents", "scale": values.get("scaling_factor") or 1.0,
            "shift": values.get("shift_factor") or 0.0, "latents_mean": values.get("latents_mean") or (),
            "latents_std": values.get("latents_std") or (),
        })

    def _channelwise(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if not (self.latents_mean and self.latents_std):
            return self.shift, self.scale
        mean = torch.tensor(self.latents_mean, device=like.device).view(-1, 1, 1)
        return mean, self.scale / torch.tensor(self.latents_std, device=like.device).view(-1, 1, 1)

    def to_x0(self, latents: Tensor) -> Tensor:
        """x0 of the autoencoder's latents (b, c, h, w)."""
        shift, scale = self._channelwise(latents)
        return (latents - shift) * scale

    def to_latents(self, x0: Tensor) -> Tensor:
        """Inverse of `to_x0`."""
        shift, scale = self._channelwise(x0)
        return x0 / scale + shift


Decode = Callable[[Tensor], np.ndarray]
"""x0 (b, c, h, w) to uint8 images (b, H, W, channels): `to_uint8` of pixels, `LatentDecoder.decode` of latents."""


class LatentDecoder:
    """Decodes x0 by a diffusers autoencoder.

    Args:
        autoencoder: a folder, a hub id such as stabilityai/sd-vae-ft-ema, or a loaded one.
        config: how x0 was made of latents; by default by the autoencoder's configuration.
        device: for one that is not loaded yet.

    Raises:
        OSError: when there is no such autoencoder.
        ValueError: when its files are damaged or of a kind that could run code.
    """

    def __init__(
        self, autoencoder: str | Path | Autoencoder, config: CodecConfig | None = None,
        device: torch.device | str = "cpu",
    ):
        self.autoencoder = autoencoder if isinstance(autoencoder, Autoencoder) else Autoencoder(autoencoder, device)
        self.config = config or CodecConfig.of(self.autoencoder)

    def decode(self, x0: Tensor) -> np.ndarray:
        # one at a time: the decoder's activations are far larger than the network's
        decode, to_latents = self.autoencoder.decode, self.config.to_latents
        return np.concatenate([to_uint8(decode(to_latents(x.float()))) for x in x0.split(1)])
