"""A trained network as a diffusers pipeline in one folder: weights, scheduler, autoencoder, names, model card."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lamamba.data.labels import as_names, imagenet_names, short_names
from lamamba.diffusion.denoise import samplers_for
from lamamba.exporting.model_card import TrainingInfo, model_card
from lamamba.exporting.onnx import export_onnx
from lamamba.options.export import ExportOptions
from lamamba.pipeline import build_pipeline
from lamamba.runs.folder import CheckpointState, RunFolder
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import Model
from lamamba.sampling.settings import MAX_SEED
from lamamba.utils.distributed import pick_device
from lamamba.utils.files import read_text, replacing
from lamamba.utils.progress import Progress, Report
from lamamba.viz.grids import check_grid, grid_picture, save_picture

logger = logging.getLogger("lamamba.exporting")

MAX_GRID_CLASSES = 10


def write_pipeline_folder(
    options: ExportOptions, model: Model, report: Report
) -> tuple[Image.Image | None, float | None]:
    """Write a pipeline folder, whole or not at all.

    Args:
        options: the folder that the model is in, target, scheduler, autoencoder, names, grid, precision.
        model: its network is cast to options.dtype on the CPU.
        report: progress of the grid, in evaluations of the network.

    Returns:
        The grid of samples, and the relative error of ONNX's output; None where none was made.

    Raises:
        ValueError: when sampler, autoencoder, names or guidance do not fit the network.
    """
    config = model.network.architecture
    sampler = options.sampler or samplers_for(config.objective)[0]
    names = _label_names(options.labels, model.metadata.label_names, config.num_classes)
    pipe = build_pipeline(model, sampler, names, options.guidance)
    guidance = options.guidance
    if guidance is None:
        guidance = default_guidance(model.metadata.guidance, config.num_classes)
    rows = min(config.num_classes, MAX_GRID_CLASSES) or 1
    check_grid(rows * options.images, *model.fit(None, None)[1], advice=" (images is of each class): take fewer")
    if options.seed + options.images - 1 > MAX_SEED:
        raise ValueError(f"seed {options.seed} + {options.images} images goes beyond the largest seed, {MAX_SEED}")
    grid, onnx_error = None, None
    with replacing(options.target) as folder:
        if options.images:
            grid = sample_grid(pipe, options.images, options.steps, guidance, options.seed, options.device, report)
            save_picture(grid, folder / "samples.png")
        if options.onnx:
            onnx_error = export_onnx(torch.nn.Module.float(model.network).cpu(), folder / "onnx" / "unet.onnx", report)
            logger.info("onnx/unet.onnx: relative error against PyTorch in onnxruntime: %.1e", onnx_error)
        for part in filter(None, (pipe.unet, pipe.vae)):
            torch.nn.Module.to(part, "cpu", getattr(torch, options.dtype))
        pipe.save_pretrained(folder)
        card = model_card(
            options.name or options.target.name, pipe, sampler=sampler, guidance=guidance, licence=options.licence,
            training=_training_info(options), has_grid=grid is not None,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return grid, onnx_error


def _label_names(given: str | None, own: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    if given is None:
        return own
    if given == "imagenet":
        return as_names(imagenet_names(), num_classes)
    file = Path(given)
    if not file.is_file():
        raise FileNotFoundError(f"labels={given} is neither \"imagenet\" nor a text file with one name per line")
    lines = read_text(file).rstrip("\n").split("\n")
    try:
        if "" in map(str.strip, lines):
            raise ValueError(f"line {[line.strip() for line in lines].index('') + 1} is empty")
        return as_names(lines, num_classes)
    except ValueError as error:
        raise ValueError(f"labels={given}: {error}; write a line for each class") from error


def sample_grid(
    pipe: Any, images: int, steps: int | None, guidance: float, seed: int, device: str, report: Report
) -> Image.Image:
    """A row of images, with seeds from `seed`, for each of up to MAX_GRID_CLASSES classes spread over all."""
    pipe.to(pick_device(device))
    pipe.set_progress_bar_config(disable=True)
    num_classes, names = pipe.unet.config["num_classes"], short_names(pipe.label_names)
    count = min(num_classes, MAX_GRID_CLASSES)
    rows: list[Any] = [round(label) for label in np.linspace(0, num_classes - 1, count)] if count else [None]
    pictures: list[Any] = []
    for row, label in enumerate(rows):
        def on_step(pipe: Any, step: int, time: Any, tensors: dict, row: int = row) -> dict:
            steps = pipe.num_timesteps
            report(Progress("sampling", row * steps + step + 1, len(rows) * steps, "steps"))
            return tensors

        pictures += pipe(
            label, num_images_per_label=images, num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + k) for k in range(images)], callback_on_step_end=on_step,
        ).images
    pixels = np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures])
    return grid_picture(pixels, images, [names[row] if names else str(row) for row in rows] if count else [])


def _training_info(options: ExportOptions) -> TrainingInfo | None:
    """What the run says of a checkpoint; None for a saved model."""
    place = options.source.absolute()
    run = RunFolder(place.parent.parent)
    if place.parent.name != "checkpoints" or not run.config.is_file():
        return None
    config, state = run.read_config(), CheckpointState.load(place)
    decays = state.ema_decays or config.train.get("ema_decays") or [None]
    return TrainingInfo(vars(config), state.step, decays[0] if options.ema is None else options.ema)
