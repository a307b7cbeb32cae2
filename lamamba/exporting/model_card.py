"""The README.md of an exported model: what it is, how it was trained, how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamamba._version import __version__
from lamamba.config import UNetConfig
from lamamba.pipeline import LaMambaPipeline
from lamamba.utils.text import counted

TRAINING_SETTINGS = {
    "steps": "optimizer steps planned", "batch_size": "batch", "label_dropout": "labels dropped", "seed": "seed",
}


@dataclass(frozen=True)
class TrainingInfo:
    """Where a model's weights come from, for models of a run."""

    run: Mapping[str, Any]
    """The run's config.json."""
    step: int | None
    """Optimizer steps done, where known."""
    ema: float | Literal["none"] | None
    """Decay of the EMA weights; "none": the trained weights."""


def model_card(
    title: str, pipe: LaMambaPipeline, *, sampler: str, guidance: float, licence: str | None,
    training: TrainingInfo | None, has_grid: bool,
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        title: the model's name.
        pipe: the pipeline that lies beside the card.
        sampler: the scheduler's short name.
        guidance: scale of the grid of samples.
        licence: of the weights, where stated.
        training: of the run that the weights come from.
        has_grid: whether samples.png lies beside the card.
    """
    config, names = pipe.unet.architecture, pipe.label_names
    label = f"{_quoted(names[0].split(', ')[0])}, " if names else "0, " if config.num_classes else ""
    stated = licence or "not stated by whoever exported it"
    return f"""{_front_matter(config, licence)}
# {title}

A LaMamba-Diff network ([arXiv 2408.02615](https://arxiv.org/abs/2408.02615)) as a diffusers pipeline.

{_grid(config, sampler, guidance) if has_grid else ""}```python
import torch
from lamamba import LaMambaPipeline                       # pip install lamamba-diff

pipe = LaMambaPipeline.from_pretrained({_quoted(title)})         # this folder, or its hub id
image = pipe({label}generator=torch.Generator().manual_seed(0)).images[0]
```

With diffusers alone: `DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)`.

## The network

{_network(pipe, sampler)}

## Training

{_training(training)}

## Licence

Of these weights: {stated}. The code that runs them is under the Apache License 2.0.

Exported by lamamba {__version__}.
"""


def _quoted(text: str) -> str:
    """Text as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _front_matter(config: UNetConfig, licence: str | None) -> str:
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- lamamba-diff
- {"class-conditional" if config.num_classes else "unconditional"}
{f"license: {licence}{chr(10)}" if licence else ""}---
"""


def _grid(config: UNetConfig, sampler: str, guidance: float) -> str:
    legend = f"*One row per class, one seed per column; guidance {guidance:g}, {sampler}.*\n\n"
    return "![samples](samples.png)\n\n" + (legend if config.num_classes else "")


def _network(pipe: LaMambaPipeline, sampler: str) -> str:
    config, pixels = pipe.unet.architecture, pipe.pixels_per_input
    height, width = (side * pixels for side in config.input_size)
    kind = counted(config.num_classes, "class") if config.num_classes else "unconditional"
    return _table([
        ("images", f"{height} x {width} pixels, {kind}"),
        ("parameters", f"{pipe.unet.num_parameters() / 1e6:.2f} M"),
        ("width, heads, window", f"{config.width}, {config.num_heads}, {config.window_size}"),
        ("blocks", f"{', '.join(map(str, config.depths))} / {config.bottleneck_depth} / "
                   f"{', '.join(map(str, config.decoder_depths))} (encoder / bottleneck / decoder)"),
        ("state size, scan", f"{config.state_size}, {config.scan}"),
        ("objective", config.objective),
        ("works on", "pixels" if pipe.vae is None else f"latents of {type(pipe.vae).__name__}"),
        ("sampler", f"{sampler} (saved as the scheduler; any of diffusers' that fits can take its place)"),
    ])


def _table(rows: list[tuple[str, str]]) -> str:
    escaped = [(name, value.replace("|", "\\|")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in escaped)])


def _training(training: TrainingInfo | None) -> str:
    if training is None:
        return "Not known: the model was exported from a saved model, not from a run."
    run, ema = training.run, training.ema
    train = run.get("train", {})
    data, optimizer = train.get("data", {}), train.get("optimizer", {})
    rows = [("data", Path(str(data.get("source"))).name)]                       # the path is of another disk
    if training.step is not None:
        rows.append(("optimizer steps done", str(training.step)))
    rows += [(words, str(train[key])) for key, words in TRAINING_SETTINGS.items() if train.get(key) is not None]
    rows += [(f"optimizer: {key.replace('_', ' ')}", str(value)) for key, value in optimizer.items()]
    averaged = "their average" if ema is None else "as trained" if ema == "none" else f"their average, decay {ema:g}"
    rows.append(("weights", averaged))
    rows.append(("lamamba", str(run.get("lamamba"))))
    return _table(rows)
