"""A trained network as a diffusers pipeline in one folder: weights, scheduler, autoencoder, names, model card."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig
from lamamba.data.labels import as_names, imagenet_names, short_names
from lamamba.diffusion.denoise import make_scheduler, samplers_for
from lamamba.exporting.model_card import TrainingInfo, model_card
from lamamba.exporting.onnx import export_onnx
from lamamba.models.unet import LaMambaUNet
from lamamba.options.export import ExportOptions
from lamamba.pipeline import LaMambaPipeline
from lamamba.runs.metadata import ModelMetadata, default_guidance
from lamamba.runs.model import find_place
from lamamba.utils.distributed import pick_device
from lamamba.utils.files import read_json, temporary_name
from lamamba.utils.progress import Progress, Report
from lamamba.viz.grids import grid_picture, save_picture

logger = logging.getLogger("lamamba.exporting")

MAX_GRID_CLASSES = 10


def write_pipeline_folder(
    options: ExportOptions, model: LaMambaUNet, metadata: ModelMetadata, report: Report
) -> tuple[Image.Image | None, float | None]:
    """Write a pipeline folder, whole or not at all.

    Args:
        options: target, scheduler, autoencoder, names, grid, precision.
        model: the network; cast to options.dtype on the CPU.
        metadata: of the network.
        report: progress of the grid, in evaluations of the network.

    Returns:
        The grid of samples, and the relative error of ONNX's output; None where none was made.

    Raises:
        ValueError: when sampler, autoencoder, names or guidance do not fit the network.
    """
    temporary = temporary_name(options.target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        grid, onnx_error = _write(options, model, metadata, temporary, report)
        temporary.rename(options.target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return grid, onnx_error


def _write(
    options: ExportOptions, model: LaMambaUNet, metadata: ModelMetadata, folder: Path, report: Report
) -> tuple[Image.Image | None, float | None]:
    config = model.architecture
    sampler = options.sampler or samplers_for(config.objective)[0]
    pipe = build_pipeline(model, metadata, sampler, options.autoencoder, options.labels)
    guidance = options.guidance
    if guidance is None:
        guidance = default_guidance(metadata.guidance, config.num_classes)
    grid, onnx_error = None, None
    if options.images:
        grid = sample_grid(pipe, options.images, options.steps, guidance, options.seed, options.device, report)
        save_picture(grid, folder / "samples.png")
    if options.onnx:
        logger.info("onnx/unet.onnx: every block is traced, a minute for a small network, more for others")
        onnx_error = export_onnx(torch.nn.Module.float(model).cpu(), folder / "onnx" / "unet.onnx")
        logger.info("onnx/unet.onnx: relative error against PyTorch in onnxruntime: %.1e", onnx_error)
    for part in (pipe.unet, pipe.vae):
        if part is not None:
            torch.nn.Module.to(part, "cpu", getattr(torch, options.dtype))
    pipe.save_pretrained(folder)
    card = model_card(
        options.name or options.target.name, pipe, sampler=sampler, guidance=guidance, licence=options.licence,
        training=_training_info(options), has_grid=grid is not None,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return grid, onnx_error


def build_pipeline(
    model: LaMambaUNet, metadata: ModelMetadata, sampler: str, autoencoder: str | None, labels: str | None
) -> LaMambaPipeline:
    """A pipeline of a network, with no path of this disk in its configuration.

    Args:
        model, metadata: the network.
        sampler: a name from lamamba.diffusion.denoise.SAMPLERS.
        autoencoder: of a network of latents; by default the one of its training.
        labels: "imagenet", or a text file with one name per line; by default the names in the metadata.

    Raises:
        ValueError: when one of them does not fit the network.
    """
    config = model.architecture
    scheduler = make_scheduler(sampler, config.objective)
    names = _label_names(labels, metadata.label_names, config.num_classes)
    vae, codec = _find_vae(metadata, autoencoder)
    for part in (model, vae):
        if part is not None:
            part.register_to_config(_name_or_path="")
    id2label = dict(enumerate(names)) if names else None
    return LaMambaPipeline(model, vae, scheduler, id2label, codec, metadata.guidance)


def _find_vae(metadata: ModelMetadata, given: str | None) -> tuple[Any, dict[str, Any] | None]:
    """The autoencoder of a network of latents, and the codec entries in which the network deviates from it."""
    if metadata.codec != "latents":
        if given is not None:
            raise ValueError("this model makes pixels: leave --autoencoder out")
        return None, None
    name = given or metadata.autoencoder
    if name is None:
        raise ValueError("this model makes latents: name the autoencoder that decodes them with --autoencoder")
    autoencoder = Autoencoder(name)
    if metadata.autoencoder_sha256 not in (None, autoencoder.sha256):
        logger.warning(
            "trained on latents of %s, exported with another autoencoder: %s", metadata.autoencoder, autoencoder
        )
    configured = dataclasses.asdict(CodecConfig.of_config(autoencoder.config))
    trained = {key: getattr(metadata, key) for key in ("scale", "shift", "latents_mean", "latents_std")}
    return autoencoder.network, trained if any(configured[key] != trained[key] for key in trained) else None


def _label_names(given: str | None, own: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    if given is None:
        return own
    if given == "imagenet":
        return as_names(imagenet_names(), num_classes)
    file = Path(given)
    if not file.is_file():
        raise FileNotFoundError(f"--labels {given} is neither \"imagenet\" nor a text file with one name per line")
    return as_names(file.read_text(encoding="utf-8").split("\n")[:num_classes], num_classes)


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
    place = find_place(options.source)
    run_config = place.parent.parent / "config.json"
    if place.parent.name != "checkpoints" or not run_config.is_file():
        return None
    run, state = read_json(run_config), read_json(place / "state.json")
    decays = state.get("ema_decays") or run.get("train", {}).get("ema_decays") or [None]
    return TrainingInfo(run, state.get("step"), options.ema or decays[0])
