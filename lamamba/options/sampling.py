"""What every call that samples takes: model, sampler, guidance, size, precision."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from lamamba.options.base import FilePath, Ge, options


@options
class DenoisingOptions:
    """How noise becomes an image; None is the model's or the sampler's default."""

    sampler: str | None = None
    """ddpm, ddim, dpm++, dpm++-sde, unipc, euler or heun for noise and v models; flow-euler, flow-heun, flow-dpm++ or
    flow-unipc for flow models. By default the first."""
    steps: Annotated[int, Ge(1)] | None = None
    """Sampling steps; by default the sampler's."""
    guidance: float | None = None
    """Guidance scale; 1 is none. By default the model's own, from its recipe; else 2 (1 for unconditional models)."""


@options
class SamplerOptions(DenoisingOptions):
    """How to sample; None is the model's or the sampler's default, or with `like` the picture's value."""

    model: Annotated[FilePath | None, tyro.conf.Positional] = None
    """Run folder, checkpoint, or saved model; by default the digits model that ships with the package."""
    like: FilePath | None = None
    """A PNG made by lamamba: whatever is not said here is done as it was done there."""
    classes: str | None = None
    """Classes by number or name, with commas; by default the first ten (for many images: all). Not for unconditional
    models."""
    seed: Annotated[int, Ge(0)] | None = None
    """Seed of the first image; by default 0."""
    guidance_channels: Literal["all", "first-three"] | None = None
    """Guide all channels (the paper's code, and the default) or the first three (DiT's)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these times, 0 (clean) to 1 (noise)."""
    guidance_rescale: float | None = None
    """0 (off) to 1: how much of the contrast that guidance adds is taken back."""
    autoguidance: FilePath | None = None
    """A guiding model (smaller, or an earlier checkpoint), in place of the model without labels."""
    height: int | None = None
    """Of an image in pixels; by default as in training."""
    width: int | None = None
    """Of an image in pixels; by default as in training."""
    batch_size: Annotated[int, Ge(1)] | None = None
    """Images at a time; changes speed and memory, and a pixel by at most one grey level. By default 64."""
    autoencoder: str | None = None
    """For models of latents: a diffusers autoencoder, a folder or a hub id such as stabilityai/sd-vae-ft-ema. By
    default the one that made the latents it was trained on."""
    device: str = "auto"
    """"auto" (a GPU where there is one; under torchrun each process its own), or a PyTorch device."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the network, by default float32 (the sampler's own arithmetic always is)."""
    compile: bool = False
    """torch.compile the network first: worth its minute or two for many images, not for a few."""
