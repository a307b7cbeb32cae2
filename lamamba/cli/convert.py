"""lamamba convert: official checkpoints to our format, and back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamamba.cli.parse import parse

DESCRIPTION = """Convert an official LaMamba-Diff checkpoint (.pt) to a folder in our format, or a folder back to .pt.

  lamamba convert lamamba-xl.pt models/xl               reads the EMA weights; nothing in the file is executed
  lamamba convert models/xl back.pt                     for the official code's strict loader

The result samples with: lamamba sample models/xl --autoencoder stabilityai/sd-vae-ft-ema --classes 207"""

SD_VAE_SCALE = 0.18215
"""Factor on the latents of Stable Diffusion's autoencoder, with which the official models are trained."""


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    source: Annotated[Path, tyro.conf.Positional]
    """An official .pt file, or a folder in our format."""
    target: Annotated[Path, tyro.conf.Positional]
    """The folder or .pt file to write; it must not exist yet."""
    weights: Literal["ema", "model"] | None = None
    """Which weights of an official checkpoint; by default EMA where it has them."""


def main(arguments: list[str]) -> None:
    chosen = parse(ConvertArguments, arguments, "convert", DESCRIPTION)
    if chosen.target.exists():
        raise FileExistsError(f"{chosen.target} exists already; remove it or name another target")
    if not chosen.source.exists():
        raise FileNotFoundError(f"{chosen.source} does not exist; give an official .pt file or a model folder")
    if chosen.source.is_dir():
        if chosen.weights:
            raise ValueError("--weights chooses among an official checkpoint's; a folder has one set: leave it out")
        _to_official(chosen.source, chosen.target)
    else:
        _from_official(chosen)


def _from_official(chosen: ConvertArguments) -> None:
    from lamamba.models.official import load_official
    from lamamba.runs.metadata import ModelMetadata

    if chosen.target.suffix == ".pt":
        raise ValueError(f"both {chosen.source} and {chosen.target} are .pt files; the target must be a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = load_official(chosen.source, weights=chosen.weights)
    for warning in caught:
        print(f"note: {warning.message}")
    config = model.architecture
    is_latent = config.in_channels == 4
    temporary = chosen.target.with_name(f".{chosen.target.name}.tmp")
    model.save_pretrained(temporary)
    ModelMetadata(
        objective=config.objective, image_size=config.input_size[0] * (8 if is_latent else 1),
        codec="latents" if is_latent else "pixels", scale=SD_VAE_SCALE if is_latent else 1.0,
    ).save(temporary / "sampling.json")
    temporary.rename(chosen.target)
    print(f"{chosen.target}: width {config.width}, {config.num_heads} heads, window {config.window_size}, state size "
          f"{config.state_size}, {config.scan} scan, {config.num_classes} classes, {config.token_grid} tokens")


def _to_official(source: Path, target: Path) -> None:
    import torch

    from lamamba.models.official import to_official
    from lamamba.runs.model import find_network

    if target.suffix != ".pt":
        raise ValueError(f"{source} is a folder in our format, so the target must be a .pt file, not {target}")
    model, _ = find_network(source)
    state = to_official(model)
    temporary = target.with_name(f".{target.name}.tmp")
    torch.save({"model": state, "ema": state}, temporary)
    temporary.rename(target)
    print(f"{target}: {len(state)} tensors under the official names, as \"model\" and \"ema\"")
