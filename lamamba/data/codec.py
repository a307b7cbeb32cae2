"""Between pictures (uint8, 0 .. 255) and what the network reads: pixels in [-1, 1], or latents of an autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lamamba.data.autoencoder import Autoencoder


def to_grey_levels(x: Tensor) -> np.ndarray:
    """Pixels (b, c, h, w) in [-1, 1] to uint8 (b, h, w, c), cut off rather than rounded: the field's protocol."""
    levels = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: np.ndarray, mirror: np.ndarray | None = None) -> Tensor:
    """uint8 images (b, c, h, w), some mirrored left to right (b,) bool, to float32 pixels in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if mirror is not None:
        flags = torch.from_numpy(mirror).view(-1, 1, 1, 1)
        pixels = torch.where(flags, pixels.flip(-1), pixels)
    return pixels.float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """What x0 is made of: all that is needed to make pictures of it again."""

    codec: str = "pixels"
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

    @classmethod
    def of(cls, autoencoder: Autoencoder) -> CodecConfig:
        """As the autoencoder's configuration says."""
        facts = cls.of_config(autoencoder.config)
        return dataclasses.replace(facts, autoencoder=autoencoder.name, autoencoder_sha256=autoencoder.sha256)

    @classmethod
    def of_config(cls, values: Mapping[str, Any]) -> CodecConfig:
        """As an autoencoder's configuration says, a file's or a loaded one's, whoever it is."""
        return cls(
            codec="latents", scale=float(values.get("scaling_factor") or 1.0),
            shift=float(values.get("shift_factor") or 0.0),
            latents_mean=tuple(values.get("latents_mean") or ()), latents_std=tuple(values.get("latents_std") or ()),
        )

    def _channelwise(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if not (self.latents_mean and self.latents_std):
            return self.shift, self.scale
        mean = torch.tensor(self.latents_mean, device=like.device).view(-1, 1, 1)
        return mean, self.scale / torch.tensor(self.latents_std, device=like.device).view(-1, 1, 1)

    def to_x0(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents (b, c, h, w) as the network reads them."""
        shift, scale = self._channelwise(latents)
        return (latents - shift) * scale

    def to_latents(self, x0: Tensor) -> Tensor:
        """Undo `to_x0`."""
        shift, scale = self._channelwise(x0)
        return x0 / scale + shift


class Decoder(Protocol):
    """What sampling needs of a codec."""

    def decode(self, x0: Tensor) -> np.ndarray:
        """The network's clean output (b, c, h, w) as uint8 images (b, H, W, channels)."""
        ...


class PixelCodec:
    """Pixels themselves, scaled to [-1, 1]: one pixel of the image is one pixel of the network's input."""

    facts = CodecConfig()

    def encode(self, images: np.ndarray, mirror: np.ndarray | None = None) -> Tensor:
        """uint8 images (b, c, h, w), some mirrored left to right (b,) bool, to float32 x0 in [-1, 1]."""
        return to_pixels(images, mirror)

    def decode(self, x0: Tensor) -> np.ndarray:
        return to_grey_levels(x0)


class LatentDecoder:
    """Latents through a diffusers autoencoder: a folder, a hub id such as stabilityai/sd-vae-ft-ema, or a loaded one.

    Args:
        autoencoder: AutoencoderKL, AutoencoderDC or AutoencoderTiny.
        facts: how x0 was made of latents; by default as the autoencoder's configuration says.
        device: where to decode, when it is not loaded yet.

    Raises:
        OSError: when there is no such autoencoder.
        ValueError: when its files are damaged or of a kind that could run code.
    """

    def __init__(
        self, autoencoder: str | Path | Autoencoder, facts: CodecConfig | None = None,
        device: torch.device | str = "cpu",
    ):
        self.autoencoder = autoencoder if isinstance(autoencoder, Autoencoder) else Autoencoder(autoencoder, device)
        self.facts = facts or CodecConfig.of(self.autoencoder)

    def decode(self, x0: Tensor) -> np.ndarray:
        # one at a time: the decoder's activations are far larger than the network's
        decode, to_latents = self.autoencoder.decode, self.facts.to_latents
        return np.concatenate([to_grey_levels(decode(to_latents(x.float()))) for x in x0.split(1)])
