"""How a network is sampled while it is judged. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamamba.options.metrics import Settings


@dataclass(frozen=True)
class SampleOptions:
    """What is judged, and how it is made where it is a model."""

    num_images: int | None = None
    """Images: of a model 50,000 by default, the field's count, of each seed range; of images that are there, all."""
    seed: int = 0
    """Seed of the first image; image k is made from seed + k."""
    labels: Literal["random", "balanced"] = "random"
    """Classes drawn uniformly by each image's seed (as DiT), or in turn, equally many of each: those of `lamamba sample
    -n N --random-labels` or `--balanced`, and the same images."""
    sampler: str | None = None
    """As in lamamba sample; by default the objective's first."""
    steps: int | None = None
    """Sampling steps; by default the sampler's (ddpm: 250, as in published tables)."""
    guidance: str = "1"
    """Classifier-free guidance scale; 1 is none. Several with commas are a sweep: 1,1.25,1.5,2."""
    autoencoder: str | None = None
    """For models of latents: folder or hub id; by default the one that made the latents."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the sampled network."""
    ema: float | Literal["none"] | None = None
    """Which average: its decay, as 0.999, or "none" for the trained weights; by default the first."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    samples: Annotated[str, tyro.conf.Positional]
    """Folder, npz file, "digits", run, checkpoint, model, or "shipped"."""
    reference: str
    """Npz file, folder, or "digits"."""
    out: Path = Path("evaluation.json")
    """The result: figures and protocol. A plot, where there is one, lies beside it."""
    sampling: Annotated[SampleOptions, tyro.conf.arg(name="")] = field(default_factory=SampleOptions)
    repeats: int = 1
    """Seed ranges, one after the other; more give a mean and a standard deviation. Only for models."""
    every_checkpoint: bool = False
    """Score all checkpoints and averages of a run, and plot the curve."""
    features: str = "inception"
    """inception, dinov2, digits, or module:name."""
    weights: str | None = None
    """Of the feature network: a file (inception), a folder or hub id (dinov2)."""
    grey: Literal["refuse", "repeat"] = "refuse"
    """What to do with grey images when the feature network reads colour: repeat makes three equal channels."""
    metrics: Settings = field(default_factory=Settings)
    batch_size: int = 64
    """Images at a time, sampled and looked at; changes speed and memory, not the images."""
    shard_size: int = 1000
    """Images whose work a kill may lose."""
    keep_features: bool = False
    """Leave the features on disk at the end (in OUT.work)."""
    device: str = "auto"
    """"auto" (a GPU where there is one; under torchrun each process its own), or a PyTorch device."""


@dataclass(frozen=True, kw_only=True)
class StatsArguments:
    images: Annotated[str, tyro.conf.Positional]
    """Folder, npz file with arr_0, or "digits". All of one size, cropped as your training crops them."""
    out: Path
    """The npz file."""
    features: str = "inception"
    """inception, dinov2, digits, or module:name."""
    weights: str | None = None
    """Of the feature network."""
    image_size: int = 8
    """Of "digits": enlarged to this."""
    grey: Literal["refuse", "repeat"] = "refuse"
    """What to do with grey images when the feature network reads colour."""
    rows: int = 10_000
    """Images whose own features are saved, too, for precision, recall and KID; spread evenly."""
    batch_size: int = 64
    """Images at a time."""
    shard_size: int = 1000
    """Images whose work a kill may lose."""
    device: str = "auto"
    """"auto" or a PyTorch device."""


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files of lamamba evaluate."""
