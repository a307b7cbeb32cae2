"""Options of `lamamba.evaluate`, `lamamba.compute_statistics` and `lamamba.compare`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BeforeValidator

from lamamba.options.base import FilePath, Ge, Lt, Name, Numbers, Positive, Quantization, not_empty, one_word, options
from lamamba.options.metrics import MetricOptions


def _check_images(value: Any) -> Any:
    """A name as it is, a path as a name, an array of images as it is."""
    if isinstance(value, str | Path):
        return str(not_empty(value))
    is_array = type(value).__module__ == "numpy" and hasattr(value, "shape")
    if is_array and str(value.dtype) == "uint8" and value.ndim == 4 and value.shape[3] in (1, 3):
        return value
    what = f"{value.dtype} {value.shape}" if is_array else f"{' '.join(repr(value).split()):.60}"
    raise ValueError(f"{what} must be a name, a path, or uint8 images (n, height, width, 1 or 3)")


ImageSet = Annotated[Any, BeforeValidator(_check_images), one_word("STR", str)]
"""Images by name or path (on the command line), or in Python also a NumPy array (n, h, w, c), uint8."""


NUM_IMAGES = 50_000
"""Samples behind a published FID."""


@options
class EvaluateOptions:
    """What to evaluate, against which reference, by which protocol."""

    samples: Annotated[ImageSet, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES")]
    """Folder, npz file, "digits", run, checkpoint, model, or "shipped"."""
    reference: ImageSet
    """Npz file, folder (whose images are cropped and scaled as training does), or "digits"."""
    out: FilePath = Path("evaluation.json")
    """The result: figures and protocol. A plot, where there is one, lies beside it."""
    num_images: Annotated[int, Ge(2)] | None = None
    """Images: of a model 50,000 by default, the field's count, of each seed range; of existing images, all."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the first image; image k is made from seed + k."""
    labels: Literal["random", "balanced"] = "random"
    """Classes drawn uniformly by each image's seed (as DiT), or in turn, equally many of each: those of `lamamba sample
    -n N --random-labels` or `--balanced`, and the same images."""
    sampler: str | None = None
    """As in lamamba sample; by default the objective's first."""
    steps: Positive | None = None
    """Sampling steps; by default the sampler's (ddpm: 250, as in published tables)."""
    guidance: Numbers = (1.0,)
    """Classifier-free guidance scale. 1, no guidance, is the protocol of published figures, and the default here
    whatever the model's own scale. Several with commas are a sweep: 1,1.25,1.5,2."""
    cache: Positive | None = None
    """Compute all depths of the network in every so many evaluations only, as in lamamba sample."""
    cache_order: Literal[0, 1] | None = None
    """How the cache carries deep features on, as in lamamba sample."""
    lora: FilePath | None = None
    """A LoRA of the model, as in lamamba sample."""
    autoencoder: Name | None = None
    """For models of latents: folder or hub id; by default the one that made the latents."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the sampled network."""
    quantize: Quantization | None = None
    """Weights in eight bits, or activations, too, as in lamamba sample."""
    ema: float | Literal["none"] | None = None
    """Which average: its decay, as 0.999, or "none" for the trained weights; by default the first."""
    repeats: Positive = 1
    """Seed ranges, one after the other; more give a mean and a standard deviation. Only for models."""
    every_checkpoint: bool = False
    """Score all checkpoints and averages of a run, and plot the curve."""
    features: str = "inception"
    """inception, dinov2, digits, or module:function of your own (of a file in this folder)."""
    weights: Name | None = None
    """Weights of the feature network: a file (inception), a folder or hub id (dinov2)."""
    grey: Literal["refuse", "repeat"] = "refuse"
    """What to do with grey images when the feature network takes colour: repeat makes three equal channels."""
    metrics: MetricOptions = MetricOptions()
    batch_size: Positive = 64
    """Images per batch of the model and of the feature network; changes speed and memory, not the images."""
    shard_size: Positive = 1000
    """Images whose work a kill may lose."""
    keep_features: bool = False
    """Leave the features on disk at the end (in OUT.work)."""
    device: str = "auto"
    """"auto" (a GPU where there is one; under torchrun each process its own), or a PyTorch device."""

    def __post_init__(self) -> None:
        scales, last = self.guidance, self.seed + (self.num_images or NUM_IMAGES) * self.repeats - 1
        if self.out.suffix.lower() != ".json":
            raise ValueError(f"out={self.out}: the result is a .json file, and a plot of it lies beside it as .png")
        if last >= 2**63:
            raise ValueError(f"seed={self.seed}: the last image would have {last}, and seeds are below 2^63")
        if not scales or len(set(scales)) < len(scales) or not all(0 <= scale < math.inf for scale in scales):
            raise ValueError(f"guidance={scales}: each scale once, finite and not negative")
        if len(scales) > 1 and self.every_checkpoint:
            raise ValueError("every_checkpoint and several guidance scales are two curves; draw one at a time")


@options
class StatisticsOptions:
    """Which reference images, by which feature network."""

    images: Annotated[ImageSet, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder, npz file with arr_0, or "digits"."""
    out: FilePath
    """The npz file."""
    features: str = "inception"
    """inception, dinov2, digits, or module:function of your own (of a file in this folder)."""
    weights: Name | None = None
    """Weights of the feature network, as in lamamba evaluate."""
    image_size: Positive | None = None
    """Side in pixels to which "digits" are enlarged (by default 8) and images of files cropped and scaled, as training
    does (by default they keep theirs, which must be one)."""
    grey: Literal["refuse", "repeat"] = "refuse"
    """What to do with grey images when the feature network takes colour."""
    rows: Annotated[int, Ge(2)] = 10_000
    """Images whose own features are saved, too, for precision, recall and KID; spread evenly."""
    batch_size: Positive = 64
    """Images per batch of the feature network."""
    shard_size: Positive = 1000
    """Images whose work a kill may lose."""
    device: str = "auto"
    """"auto" or a PyTorch device."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".npz":
            raise ValueError(f"out={self.out} must end in .npz")
        if isinstance(self.images, str) and Path(self.images).resolve() == self.out.resolve():
            raise ValueError(f"out={self.out} would take the place of the images: give another file")


@options
class CompareOptions:
    """Which results to compare."""

    results: Annotated[tuple[FilePath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULT [RESULT ...]")]
    """Result files of lamamba evaluate."""

    def __post_init__(self) -> None:
        if len(self.results) < 2:
            raise ValueError("name at least two result files, as in lamamba evaluate compare a.json b.json")
