"""lamamba export: a trained network becomes a diffusers pipeline in one folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lamamba.cli.parse import parse

if TYPE_CHECKING:
    from lamamba.models.unet import LaMambaUNet
    from lamamba.pipeline import LaMambaPipeline
    from lamamba.runs.metadata import ModelMetadata

DESCRIPTION = """Make a diffusers pipeline of a trained network: weights, scheduler, autoencoder, names, a model card.

  lamamba export runs/digits exported/digits
  lamamba export models/xl exported/xl --autoencoder stabilityai/sd-vae-ft-ema --labels imagenet

The folder loads with LaMambaPipeline.from_pretrained, samples with lamamba sample, and can be pushed to a hub. Its
README.md is a model card with the configuration, what is known of the training, and a grid of samples."""

MAX_GRID_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    source: Annotated[Path, tyro.conf.Positional]
    """A run folder (its newest checkpoint), a checkpoint, or a saved model."""
    target: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist yet."""
    ema: float | Literal["none"] | None = None
    """Decay of the average to take, for runs that keep several; by default the first."""
    sampler: str | None = None
    """The sampler whose scheduler is saved; by default the first that fits. lamamba sample --help names them."""
    autoencoder: str | None = None
    """For models of latents: the autoencoder that goes with them, a folder or a hub id; by default the training's."""
    labels: str | None = None
    """Names of the classes: "imagenet", or a text file with one name per line; by default those of the training."""
    licence: str | None = None
    """The licence of these weights for the model card, such as apache-2.0 or cc-by-4.0."""
    name: str | None = None
    """The model's name in its card; by default the target's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the saved weights."""
    images: int = 8
    """Images of each class in the sample grid, for up to ten classes; 0 makes none."""
    steps: int | None = None
    """Sampling steps of the grid; by default the sampler's."""
    guidance: float | None = None
    """Guidance of the grid; by default 2 (1 for unconditional models)."""
    seed: int = 0
    """Seed of the grid's first image."""
    onnx: bool = False
    """Also write onnx/unet.onnx, the network for batches of any size, checked in onnxruntime. Needs the extra
    "export"."""
    device: str = "auto"
    """Where the grid is made: "auto" (a GPU where there is one), or a PyTorch device."""


def main(arguments: list[str]) -> None:
    chosen = parse(ExportArguments, arguments, "export", DESCRIPTION)
    if chosen.target.exists():
        raise FileExistsError(f"{chosen.target} exists already; remove it or name another target")
    if chosen.images < 0:
        raise ValueError(f"--images {chosen.images} must be 0 (no grid) or more")

    from lamamba.exporting.onnx import require_onnx
    from lamamba.runs.model import find_network

    if chosen.onnx:
        require_onnx()
    model, facts = find_network(chosen.source, chosen.ema)
    temporary = chosen.target.with_name(f".{chosen.target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(chosen, model, facts, temporary)
        temporary.rename(chosen.target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{chosen.target}: a diffusers pipeline, {_megabytes(chosen.target):.1f} MB; "
          f"LaMambaPipeline.from_pretrained(\"{chosen.target}\")")


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _write(chosen: ExportArguments, model: LaMambaUNet, facts: ModelMetadata, folder: Path) -> None:
    import torch

    from lamamba.data.autoencoder import Autoencoder
    from lamamba.data.codec import CodecConfig
    from lamamba.diffusion.denoise import make_scheduler, samplers_for
    from lamamba.pipeline import LaMambaPipeline

    config = model.architecture
    sampler = chosen.sampler or samplers_for(config.objective)[0]
    scheduler = make_scheduler(sampler, config.objective)
    names = _label_names(chosen.labels, facts.label_names, config.num_classes)
    vae: Any = None
    codec = None
    if facts.codec == "latents":
        name = chosen.autoencoder or facts.autoencoder
        if name is None:
            raise ValueError("this model makes latents: name the autoencoder that decodes them with --autoencoder")
        autoencoder = Autoencoder(name)
        if facts.autoencoder_sha256 not in (None, autoencoder.sha256):
            print(f"note: trained on latents of {facts.autoencoder}, exported with another autoencoder: {autoencoder}")
        vae = autoencoder.network
        vae.register_to_config(_name_or_path="")                                # a place on this disk
        as_configured = CodecConfig.of_config(autoencoder.config)
        keys = ("scale", "shift", "latents_mean", "latents_std")
        if any(getattr(facts, key) != getattr(as_configured, key) for key in keys):
            codec = {key: getattr(facts, key) for key in keys}
    elif chosen.autoencoder is not None:
        raise ValueError("this model makes pixels: leave --autoencoder out")
    network: Any = model                                                        # of types that diffusers hides
    network.register_to_config(_name_or_path="")
    pipe: Any = LaMambaPipeline(model, vae, scheduler, dict(enumerate(names)) if names else None, codec)
    guidance = (2.0 if config.num_classes else 1.0) if chosen.guidance is None else chosen.guidance
    has_grid = _sample_grid(chosen, pipe, guidance, folder / "samples.png") if chosen.images else False
    if chosen.onnx:
        from lamamba.exporting.onnx import export_onnx

        print("onnx/unet.onnx: every block is traced, which takes a minute for a small network, more for others",
              flush=True)
        error = export_onnx(network.float().cpu(), folder / "onnx" / "unet.onnx")
        print(f"onnx/unet.onnx: largest error over largest value against PyTorch, in onnxruntime: {error:.1e}")
    for part in (network, vae):
        if part is not None:
            torch.nn.Module.to(part, "cpu", getattr(torch, chosen.dtype))
    pipe.save_pretrained(folder)
    _write_card(chosen, pipe, sampler, guidance, has_grid, folder / "README.md")


def _label_names(given: str | None, own: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """Names by --labels, or the training's.

    Raises:
        ValueError: when there is not one for each class.
    """
    from lamamba.data.labels import as_names, imagenet_names

    if given is None:
        return own
    if given == "imagenet":
        return as_names(imagenet_names(), num_classes)
    file = Path(given)
    if not file.is_file():
        raise FileNotFoundError(f"--labels {given} is neither \"imagenet\" nor a text file with one name per line")
    return as_names(file.read_text(encoding="utf-8").split("\n")[:num_classes], num_classes)


def _sample_grid(chosen: ExportArguments, pipe: Any, guidance: float, path: Path) -> bool:
    import numpy as np
    import torch

    from lamamba.cli.callbacks import StepBar
    from lamamba.data.labels import short_names
    from lamamba.utils.distributed import pick_device
    from lamamba.viz.grids import grid_picture, save_picture

    pipe.to(pick_device(chosen.device))
    pipe.set_progress_bar_config(disable=True)
    num_classes, names = pipe.unet.config["num_classes"], short_names(pipe.label_names)
    count = min(num_classes, MAX_GRID_CLASSES)
    rows: list[Any] = [round(place) for place in np.linspace(0, num_classes - 1, count)] if count else [None]
    images: list[Any] = []
    with StepBar("sampling") as bar:
        for row, label in enumerate(rows):
            generators = [torch.Generator().manual_seed(chosen.seed + k) for k in range(chosen.images)]

            def told(pipe: Any, step: int, time: Any, tensors: dict, row: int = row) -> dict:
                bar(row * pipe.num_timesteps + step + 1, len(rows) * pipe.num_timesteps)
                return tensors

            images += pipe(
                label, num_images_per_label=chosen.images, num_inference_steps=chosen.steps, guidance_scale=guidance,
                generator=generators, callback_on_step_end=told,
            ).images
    levels = np.stack([np.atleast_3d(np.asarray(image)) for image in images])
    row_names = [names[row] if names else str(row) for row in rows] if count else []
    save_picture(grid_picture(levels, chosen.images, row_names), path)
    return True


def _write_card(
    chosen: ExportArguments, pipe: LaMambaPipeline, sampler: str, guidance: float, has_grid: bool, path: Path
) -> None:
    from lamamba.exporting.model_card import model_card
    from lamamba.runs.model import find_place
    from lamamba.utils.files import read_json

    place, run, state = find_place(chosen.source), None, {}
    run_config = place.parent.parent / "config.json"
    if place.parent.name == "checkpoints" and run_config.is_file():
        run, state = read_json(run_config), read_json(place / "state.json")
    decays = state.get("ema_decays") or (run or {}).get("train", {}).get("ema_decays") or [None]
    config, pixels = pipe.unet.architecture, pipe.pixels_per_input
    vae = None if pipe.vae is None else type(pipe.vae).__name__
    text = model_card(
        chosen.name or chosen.target.name, config, sum(p.numel() for p in pipe.unet.parameters()),
        (config.input_size[0] * pixels, config.input_size[1] * pixels), pipe.label_names, sampler=sampler,
        guidance=guidance, autoencoder=vae, licence=chosen.licence, run=run, step=state.get("step"),
        ema=chosen.ema or decays[0], has_grid=has_grid,
    )
    path.write_text(text, encoding="utf-8")
