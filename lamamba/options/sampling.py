"""What every call that samples takes (sampler, guidance, size, precision), and the options of `lamamba.sample`."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from lamamba.options.base import FilePath, Ge, Labels, Le, Name, Positive, Quantization, options

PICTURE_SUFFIXES = (".png", ".gif", ".mp4")


@options
class DenoisingOptions:
    """How noise becomes an image; None is the model's or the sampler's default."""

    sampler: str | None = None
    """ddpm, ddim, dpm++, dpm++-sde, unipc, euler or heun for noise and v models; flow-euler, flow-heun, flow-dpm++ or
    flow-unipc for flow models; flow-map for flow maps. By default the first."""
    steps: Positive | None = None
    """Sampling steps; by default the sampler's."""
    guidance: float | None = None
    """Guidance scale; 1 is none. By default the model's own, from its recipe; else 2 (1 for unconditional models)."""


@options
class SamplerOptions(DenoisingOptions):
    """How to sample; None is the model's or the sampler's default, or with `like` the picture's value."""

    model: Annotated[
        FilePath | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]", help_behavior_hint="")
    ] = None
    """Run folder, checkpoint, saved model or exported pipeline; by default the digits model that ships with the
    package ("shipped-few-steps": its flow map, for one to four steps)."""
    fast: bool = False
    """A preset for what is not given: one step of a flow map, 8 of flow-unipc for a flow, 16 of dpm++ for noise and v
    models; bfloat16 where the device has it; without MODEL, "shipped-few-steps". Guidance stays."""
    like: FilePath | None = None
    """A PNG made by lamamba: options that are not given here are taken from it."""
    classes: Labels | None = None
    """Classes by number or name, with commas; by default the first ten (for a folder of images: all). Not for
    unconditional models."""
    seed: Annotated[int, Ge(0)] | None = None
    """Seed of the first image; by default 0."""
    guidance_channels: Literal["all", "first-three"] | None = None
    """Guide all channels (the paper's code, and the default) or the first three (DiT's)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these times, 0 (clean) to 1 (noise)."""
    guidance_rescale: Annotated[float, Ge(0), Le(1)] | None = None
    """0 (off) to 1: how much of the contrast that guidance adds is taken back."""
    autoguidance: FilePath | None = None
    """A guiding model (smaller, or an earlier checkpoint), in place of the model without labels."""
    lora: FilePath | None = None
    """A LoRA of the model, a run of lamamba train --lora.rank or a folder; without MODEL, of the model that it was
    trained for."""
    cache: Positive | None = None
    """Compute all depths of the network in every so many evaluations only (more often near noise, in the first two
    always), and the outermost stages alone in the others; by default, and with 1, in all of them."""
    cache_order: Literal[0, 1] | None = None
    """How the cache carries deep features on: 1, linearly from the last two full passes (the default), or 0, as they
    were."""
    height: int | None = None
    """Height of an image in pixels; by default as in training."""
    width: int | None = None
    """Width of an image in pixels; by default as in training."""
    batch_size: Positive | None = None
    """Images at a time; changes speed and memory, and a pixel by at most one grey level. By default 64."""
    autoencoder: Name | None = None
    """For models of latents: a diffusers autoencoder, a folder or a hub id such as stabilityai/sd-vae-ft-ema. By
    default the one that made the latents it was trained on."""
    device: str = "auto"
    """"auto" (a GPU where there is one; under torchrun each process its own), or a PyTorch device."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the network, by default float32 (the sampler's own arithmetic always is)."""
    quantize: Quantization | None = None
    """Weights in eight bits, by torchao (pip install 'lamamba-diff[quantize]'); int8-dynamic: activations, too; fp8:
    both in float8, on GPUs that multiply it, with dtype bfloat16."""
    compile: bool = False
    """torch.compile the network first: worth its minute or two for many images, not for a few."""


@options
class SampleOptions(SamplerOptions):
    """Which images, on one picture or in a film."""

    out: FilePath | None = None
    """A picture (.png) or a film of the denoising or the interpolation (.gif, .mp4); in Python None writes no file."""
    num: Annotated[Positive | None, tyro.conf.arg(aliases=["-n"])] = None
    """Images of each class (or in all, for an unconditional model). By default 8."""
    interpolate: str | None = None
    """seeds:A:B or classes:A:B: --num images on the way from one seed to another, or from one class to another."""
    fps: Annotated[float, Ge(0.1), Le(50)] = 12
    """Frames per second of a film."""

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix.lower() not in PICTURE_SUFFIXES:
            raise ValueError(f"out={self.out}: pictures are .png, films .gif or .mp4; for a folder see sample_folder")
