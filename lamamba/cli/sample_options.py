"""How a network is sampled while it is judged. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
