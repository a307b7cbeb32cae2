"""The README.md of an exported model: what it is, how it was trained, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lamamba._version import __version__
from lamamba.config import UNetConfig

TRAINING_FACTS = {
    "steps": "optimizer steps planned", "batch_size": "batch", "label_dropout": "labels dropped", "seed": "seed",
}


def model_card(
    title: str,
    config: UNetConfig,
    parameters: int,
    image_size: tuple[int, int],
    names: tuple[str, ...],
    *,
    sampler: str,
    guidance: float,
    autoencoder: str | None,
    licence: str | None,
    run: Mapping[str, Any] | None,
    step: int | None,
    ema: float | Literal["none"] | None,
    has_grid: bool,
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        title: the model's name.
        image_size: height and width of its images in pixels.
        run: a run's config.json, where the model comes from one.
        step: optimizer steps done, where known.
    """
    label = f"\"{names[0].split(', ')[0]}\", " if names else "0, " if config.num_classes else ""
    kind = f"{config.num_classes} classes" if config.num_classes else "unconditional"
    rows = [
        ("images", f"{image_size[0]} x {image_size[1]} pixels, {kind}"),
        ("parameters", f"{parameters / 1e6:.2f} M"),
        ("width, heads, window", f"{config.width}, {config.num_heads}, {config.window_size}"),
        ("blocks", f"{', '.join(map(str, config.depths))} / {config.bottleneck_depth} / "
                   f"{', '.join(map(str, config.decoder_depths))} (encoder / bottleneck / decoder)"),
        ("state size, scan", f"{config.state_size}, {config.scan}"),
        ("objective", config.objective),
        ("works on", f"latents of {autoencoder}" if autoencoder else "pixels"),
        ("sampler", f"{sampler} (saved as the scheduler; any of diffusers' that fits can take its place)"),
    ]
    grid = "![samples](samples.png)\n\n*One row per class, one seed per column; guidance " \
           f"{guidance:g}, {sampler}.*\n\n" if has_grid and config.num_classes else \
           "![samples](samples.png)\n\n" if has_grid else ""
    stated = licence or "not stated by whoever exported it"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- lamamba-diff
- {"class-conditional" if config.num_classes else "unconditional"}
{f"license: {licence}{chr(10)}" if licence else ""}---

# {title}

A LaMamba-Diff network ([arXiv 2408.02615](https://arxiv.org/abs/2408.02615)) as a diffusers pipeline.

{grid}```python
import torch
from lamamba import LaMambaPipeline                       # pip install lamamba-diff

pipe = LaMambaPipeline.from_pretrained("{title}")         # this folder, or its hub id
image = pipe({label}generator=torch.Generator().manual_seed(0)).images[0]
```

With diffusers alone: `DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)`.

## The network

{_table(rows)}

## Training

{_training(run, step, ema)}

## Licence

Of these weights: {stated}. The code that runs them is under the Apache License 2.0.

Exported by lamamba {__version__}.
"""


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _training(run: Mapping[str, Any] | None, step: int | None, ema: float | Literal["none"] | None) -> str:
    if run is None:
        return "Not known: the model was exported from a saved model, not from a run."
    train = run.get("train", {})
    data, optimizer = train.get("data", {}), train.get("optimizer", {})
    rows = [("data", Path(str(data.get("source"))).name)]                       # a path says more about a disk
    if step is not None:
        rows.append(("optimizer steps done", str(step)))
    rows += [(words, str(train[key])) for key, words in TRAINING_FACTS.items() if train.get(key) is not None]
    rows += [(f"optimizer: {key.replace('_', ' ')}", str(value)) for key, value in optimizer.items()]
    averaged = "their average" if ema is None else "as trained" if ema == "none" else f"their average, decay {ema:g}"
    rows.append(("weights", averaged))
    rows.append(("lamamba", str(run.get("lamamba"))))
    return _table(rows)
