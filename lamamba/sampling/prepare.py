"""From options to an open model, a guiding model and the settings of a picture."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lamamba.diffusion.denoise import SAMPLERS, make_scheduler, samplers_for
from lamamba.diffusion.guidance import Guidance
from lamamba.models.unet import LaMambaUNet
from lamamba.options.sampling import SamplerOptions
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import SHIPPED, Model, fingerprint, move, open_model, open_network
from lamamba.sampling.settings import ImageMetadata, Settings
from lamamba.utils.distributed import is_main_process

logger = logging.getLogger("lamamba.sampling")

Options = TypeVar("Options", bound=SamplerOptions)


def as_in_picture(options: Options, picture: ImageMetadata) -> Options:
    """Fill the options that are None with the values of a picture."""
    settings, guidance = picture.settings, picture.settings.guidance
    before: dict[str, Any] = {
        "sampler": settings.sampler, "steps": settings.steps, "guidance": guidance.scale,
        "guidance_channels": guidance.channels, "guidance_interval": tuple(guidance.interval),
        "guidance_rescale": guidance.rescale, "height": settings.height, "width": settings.width,
        "batch_size": picture.batch_size, "dtype": settings.dtype, "autoencoder": settings.autoencoder,
        "model": None if settings.model == SHIPPED else Path(settings.model),
        "autoguidance": None if settings.autoguidance is None else Path(settings.autoguidance),
    }
    given = {entry.name: getattr(options, entry.name) for entry in fields(options)}
    if given["model"] is not None:                                              # another model: sizes of its own
        before = {key: before[key] for key in before if key not in ("height", "width", "autoencoder", "autoguidance")}
    if given["sampler"] is not None and given["sampler"] != settings.sampler:   # steps mean another thing
        del before["steps"]
    return replace(
        options, compile=options.compile or settings.compiled,
        **{key: value for key, value in before.items() if given[key] is None},
    )


def prepare(
    options: SamplerOptions, picture: ImageMetadata | None, device: torch.device
) -> tuple[Model, LaMambaUNet | None, Settings]:
    """Open the model and the guiding model, and put the settings together; with notes for the log of rank 0.

    Args:
        options: filled by `as_in_picture`, where a picture is to be repeated.
        picture: that picture.
        device: where the autoencoder decodes.

    Raises:
        ValueError: when they do not fit together, or the model is not the one that made the picture to be repeated.
    """
    model = open_model(_find_folder(options, picture), autoencoder=options.autoencoder, device=device)
    is_main = is_main_process()
    if is_main and model.name == SHIPPED:
        logger.info("no model was named: the small digits model that ships with lamamba draws")
    if picture is not None and model.name == picture.settings.model and model.sha256 != picture.settings.model_sha256:
        raise ValueError(
            f"{options.like} was made by the shipped model of another lamamba ({picture.lamamba}); name a model as "
            "MODEL" if model.name == SHIPPED else
            f"{model.name} is not the model that made {options.like} (weights {model.sha256[:12]}, not "
            f"{picture.settings.model_sha256[:12]}): it was trained further, or is another. Name the one to use as "
            "MODEL"
        )
    objective = model.network.architecture.objective
    sampler = options.sampler or samplers_for(objective)[0]
    make_scheduler(sampler, objective, options.steps)                           # refused before any work
    guiding_model = None if options.autoguidance is None else open_network(options.autoguidance)[0]
    can_guide = bool(model.num_classes or guiding_model)
    scale = default_guidance(model.metadata.guidance, can_guide) if options.guidance is None else options.guidance
    guidance = Guidance(
        scale, options.guidance_channels or "all", options.guidance_interval or (0.0, 1.0),
        options.guidance_rescale or 0.0,
    )
    _, (height, width) = model.fit(options.height, options.width)
    if is_main and model.decoder and model.metadata.autoencoder_sha256 not in (None, model.decoder.autoencoder.sha256):
        logger.info(
            "note: trained on latents of %s, decoded by another autoencoder: %s", model.metadata.autoencoder,
            model.decoder.autoencoder,
        )
    settings = Settings(
        model=model.name, model_sha256=model.sha256, sampler=sampler,
        steps=options.steps or SAMPLERS[sampler].default_steps, height=height, width=width, guidance=guidance,
        autoguidance=None if guiding_model is None else str(options.autoguidance),
        autoguidance_sha256=None if guiding_model is None else fingerprint(guiding_model),
        autoencoder=model.decoder.autoencoder.name if model.decoder else None,
        autoencoder_sha256=model.decoder.autoencoder.sha256 if model.decoder else None,
        dtype=options.dtype or "float32", compiled=options.compile,
    )
    for part in ("autoguidance", "autoencoder"):
        name = getattr(settings, part)
        if picture is not None and name is not None and name == getattr(picture.settings, part) and (
            getattr(settings, f"{part}_sha256") != getattr(picture.settings, f"{part}_sha256")
        ):
            raise ValueError(f"{name} is not what made {options.like}: it has changed. Restore it, or name another")
    return model, guiding_model, settings


def _find_folder(options: SamplerOptions, picture: ImageMetadata | None) -> Path | None:
    """The folder of the model; None for the shipped one, which may have been elsewhere when it made the picture.

    Raises:
        FileNotFoundError: when the model that made the picture to be repeated is not where it was.
    """
    folder = options.model
    if picture is None or folder is None or str(folder) != picture.settings.model or folder.exists():
        return folder
    try:
        if fingerprint(open_network(None)[0]) == picture.settings.model_sha256:
            return None
    except FileNotFoundError:
        pass
    raise FileNotFoundError(f"{options.like} was made by {folder}, which is not here: name the model's folder as MODEL")


def to_device(
    model: Model, guiding_model: LaMambaUNet | None, settings: Settings, device: torch.device, batch: int
) -> LaMambaUNet | None:
    """Move both networks to the device, prepared for batches of so many images; returns the guiding model."""
    dtype = getattr(torch, settings.dtype)
    model.prepare(device, dtype, settings.compiled, batch)
    return None if guiding_model is None else move(guiding_model, device, dtype)
