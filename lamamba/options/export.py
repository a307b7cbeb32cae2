"""Options of `lamamba.export`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import tyro

from lamamba.options.base import FilePath, Ge, Name, options
from lamamba.utils.text import shown


@options
class ExportOptions:
    """Which network becomes a diffusers pipeline, and with what."""

    source: Annotated[FilePath, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run folder (its newest checkpoint), a checkpoint, or a saved model."""
    target: Annotated[FilePath, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder to write; it must not exist yet."""
    ema: float | Literal["none"] | None = None
    """Decay of the EMA weights to take, for runs that keep several; by default the first. "none": as trained."""
    sampler: str | None = None
    """The sampler whose scheduler is saved; by default the first that fits. lamamba sample --help names them."""
    autoencoder: Name | None = None
    """For models of latents: the autoencoder that goes with them, a folder or a hub id; by default the training's."""
    labels: Name | None = None
    """Names of the classes: "imagenet", or a text file with one name per line; by default those of the training."""
    licence: str | None = None
    """The licence of these weights for the model card, such as apache-2.0 or cc-by-4.0."""
    name: str | None = None
    """The model's name in its card; by default the target's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the saved weights."""
    images: Annotated[int, Ge(0)] = 8
    """Images of each class in the sample grid, for up to ten classes; 0 makes none."""
    steps: int | None = None
    """Sampling steps of the grid; by default the sampler's."""
    guidance: float | None = None
    """Guidance scale of the grid; by default the model's own (2 where it has none; 1 for unconditional models)."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the grid's first image."""
    onnx: bool = False
    """Also write onnx/unet.onnx, the network for batches of any size, checked in onnxruntime. Needs the extra
    "export"."""
    device: str = "auto"
    """Where the grid is made: "auto" (a GPU where there is one), or a PyTorch device."""

    def __post_init__(self) -> None:
        if self.licence is not None and not re.fullmatch(r"[A-Za-z][\w.+-]+", self.licence):
            raise ValueError(f"licence={shown(self.licence)}: give its short name, such as apache-2.0 or cc-by-4.0")
