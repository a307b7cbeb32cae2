"""From options to an open model, a guiding model, and the settings of the images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from lamamba.config import Objective
from lamamba.diffusion.denoise import SAMPLERS, make_scheduler, samplers_for
from lamamba.diffusion.guidance import Guidance, check_guidance
from lamamba.inference.quantizing import check_quantization, quantize
from lamamba.models.deep_cache import LaMambaCacheConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.options.sampling import SamplerOptions
from lamamba.pretrained import is_shipped
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import FEW_STEPS, SHIPPED, Model, base_of_lora, fingerprint, move, open_model, open_network
from lamamba.sampling.generate import ImageGenerator
from lamamba.sampling.settings import ImageMetadata, Settings, read_image_metadata
from lamamba.utils.distributed import is_rank_zero, multiplies_bfloat16

logger = logging.getLogger("lamamba.sampling")

Options = TypeVar("Options", bound=SamplerOptions)


def fill_from_picture(options: Options) -> tuple[Options, ImageMetadata | None]:
    """Options that are None filled with the values of the picture `options.like`, and its metadata.

    Raises:
        FileNotFoundError: when there is no such picture.
        ValueError: when it holds no settings, or with options.fast.
    """
    if options.like is None:
        return options, None
    if options.fast:
        raise ValueError("fast and like exclude each other: a picture's settings say how fast it was made")
    picture = read_image_metadata(options.like)
    settings, guidance = picture.settings, picture.settings.guidance
    saved: dict[str, Any] = {
        "sampler": settings.sampler, "steps": settings.steps, "guidance": guidance.scale,
        "guidance_channels": guidance.channels, "guidance_interval": tuple(guidance.interval),
        "guidance_rescale": guidance.rescale, "height": settings.height, "width": settings.width,
        "batch_size": picture.batch_size, "dtype": settings.dtype, "autoencoder": settings.autoencoder,
        "quantize": settings.quantized,
        "cache": settings.cache and settings.cache.interval, "cache_order": settings.cache and settings.cache.order,
        "model": None if settings.model == SHIPPED else Path(settings.model),
        "autoguidance": settings.autoguidance, "lora": settings.lora,
    }
    given = vars(options)
    if given["model"] not in (None, Path(settings.model)):                      # another model: sizes of its own
        saved = {key: saved[key] for key in saved if key not in (
            "height", "width", "autoencoder", "autoguidance", "lora")}
        if settings.lora is not None and options.lora is None:
            logger.info("%s was made with the LoRA %s: left out, it is for another model", options.like, settings.lora)
    if given["sampler"] is not None and given["sampler"] != settings.sampler:   # steps mean another thing
        del saved["steps"]
    filled = replace(
        options, compile=options.compile or settings.compiled,
        **{key: value for key, value in saved.items() if given[key] is None},
    )
    return filled, picture


FAST = {"flow-map": ("flow-map", 1), "flow": ("flow-unipc", 8), "noise": ("dpm++", 16), "v": ("dpm++", 16)}
"""Sampler and steps of the preset `fast` by objective: the fewest after which more change little (docs/sampling.md)."""

def with_fast_preset(options: Options, objective: Objective, device: torch.device) -> Options:
    """Options with the preset `fast` in the place of those that are None."""
    sampler, fewest = FAST[objective]
    steps = fewest if options.sampler in (None, sampler) else None              # of another one they mean another thing
    return replace(
        options, sampler=options.sampler or sampler, steps=options.steps or steps,
        dtype=options.dtype or ("bfloat16" if multiplies_bfloat16(device) else "float32"),
    )


@dataclass(frozen=True)
class PreparedModel:
    """A model with its guiding model and settings, ready to sample."""

    model: Model
    guiding_model: LaMambaUNet | None
    settings: Settings

    def generator(
        self, device: torch.device, batch_size: int, labels: Iterable[int] = (), num_images: int | None = None
    ) -> ImageGenerator:
        """The networks on the device, in the settings' precision, as a function of labels and seeds.

        Args:
            device: of the networks.
            batch_size: images at a time.
            labels: all labels of the run.
            num_images: images in all, where they are fewer than a batch.
        """
        model, guiding_model, settings = self.model, self.guiding_model, self.settings
        dtype = getattr(torch, settings.dtype)
        model.prepare(device, dtype, settings.compiled, min(batch_size, num_images or batch_size), settings.quantized)
        if guiding_model is not None:
            move(guiding_model, device, dtype)
            if settings.quantized:
                quantize(guiding_model, settings.quantized, compiled=settings.compiled)
        return ImageGenerator(
            model.network, sampler=settings.sampler, num_steps=settings.steps, guidance=settings.guidance,
            guiding_model=guiding_model, input_size=model.fit(settings.height, settings.width)[0],
            batch_size=batch_size, decode=model.decode, labels=labels, cache=settings.cache,
        )


def prepare(options: SamplerOptions, picture: ImageMetadata | None, device: torch.device) -> PreparedModel:
    """Open model and guiding model and resolve the settings, with notes in the log of rank 0.

    Args:
        options: from `fill_from_picture`.
        picture: from there, too.
        device: where the autoencoder decodes.

    Raises:
        ValueError: when they do not fit together, or the model is not the one that made the picture.
    """
    if options.fast and options.model is None and options.lora is None:
        options = replace(options, model=Path(FEW_STEPS))
    if options.quantize:
        dtype = getattr(torch, options.dtype or "float32")
        check_quantization(options.quantize, device, dtype, compiled=options.compile)
    folder = _find_folder(options, picture)
    if folder is None and options.lora is not None:
        folder = base_of_lora(options.lora)
    model = open_model(folder, autoencoder=options.autoencoder, device=device, lora=options.lora)
    if picture is not None and model.name == picture.settings.model and model.sha256 != picture.settings.model_sha256:
        raise ValueError(
            f"{options.like} was made by the shipped model of another lamamba ({picture.lamamba}); name a model as "
            "MODEL" if is_shipped(model.name) else
            f"{model.name} is not the model that made {options.like} (weights {model.sha256[:12]}, not "
            f"{picture.settings.model_sha256[:12]}): it was trained further, or is another. Name the one to use as "
            "MODEL"
        )
    if options.fast:
        options = with_fast_preset(options, model.network.architecture.objective, device)
    guiding_model = None if options.autoguidance is None else open_network(options.autoguidance)[0]
    settings = resolve_settings(options, model, guiding_model)
    for part in ("autoguidance", "autoencoder", "lora"):
        name = getattr(settings, part)
        if picture is not None and name is not None and name == getattr(picture.settings, part) and (
            getattr(settings, f"{part}_sha256") != getattr(picture.settings, f"{part}_sha256")
        ):
            raise ValueError(f"{name} is not what made {options.like}: it has changed. Restore it, or name another")
    if is_rank_zero():
        _log_notes(model, is_named=options.model is not None)
    return PreparedModel(model, guiding_model, settings)


def resolve_settings(options: SamplerOptions, model: Model, guiding_model: LaMambaUNet | None) -> Settings:
    """The settings of the images: options, and the model's defaults where these are None.

    Raises:
        ValueError: when an option does not fit the model.
    """
    objective, autoencoder = model.network.architecture.objective, model.decoder and model.decoder.autoencoder
    sampler = options.sampler or samplers_for(objective)[0]
    scheduler = make_scheduler(sampler, objective, options.steps)               # refused before any work
    cache = cache_config(options.cache, options.cache_order)
    if cache is not None:
        cache.check_run(len(scheduler.timesteps))
    can_guide = bool(model.num_classes or guiding_model)
    scale = default_guidance(model.metadata.guidance, can_guide) if options.guidance is None else options.guidance
    guidance = Guidance(
        scale, options.guidance_channels or "all", options.guidance_interval or (0.0, 1.0),
        options.guidance_rescale or 0.0,
    )
    check_guidance(model.network.architecture, guidance, has_guiding_model=guiding_model is not None)
    _, (height, width) = model.fit(options.height, options.width)
    return Settings(
        model=model.name, model_sha256=model.sha256, sampler=sampler,
        steps=options.steps or SAMPLERS[sampler].default_steps, height=height, width=width, guidance=guidance,
        autoguidance=None if guiding_model is None else str(options.autoguidance),
        autoguidance_sha256=None if guiding_model is None else fingerprint(guiding_model),
        autoencoder=autoencoder.name if autoencoder else None,
        autoencoder_sha256=autoencoder.sha256 if autoencoder else None,
        dtype=options.dtype or "float32", compiled=options.compile, quantized=options.quantize, cache=cache,
        lora=model.lora.name if model.lora else None, lora_sha256=model.lora.sha256 if model.lora else None,
    )


def cache_config(interval: int | None, order: Literal[0, 1] | None) -> LaMambaCacheConfig | None:
    """The cache that options name; None for none.

    Raises:
        ValueError: for an order without an interval.
    """
    if interval is None:
        if order is not None:
            raise ValueError(f"cache_order={order} needs a cache: give cache, too, as in cache=3")
        return None
    return LaMambaCacheConfig(interval=interval, order=1 if order is None else order)


def _log_notes(model: Model, *, is_named: bool) -> None:
    if not is_named and model.name == SHIPPED and model.lora is None:
        logger.info("no model was named: the small digits model that ships with lamamba draws")
    if model.decoder and model.metadata.autoencoder_sha256 not in (None, model.decoder.autoencoder.sha256):
        logger.info(
            "note: trained on latents of %s, decoded by another autoencoder: %s", model.metadata.autoencoder,
            model.decoder.autoencoder,
        )


def _find_folder(options: SamplerOptions, picture: ImageMetadata | None) -> Path | None:
    """The folder of the model; None for the shipped one, which may have been elsewhere when it made the picture.

    Raises:
        FileNotFoundError: when the model that made the picture is not where it was.
    """
    folder = options.model
    if picture is None or folder is None or is_shipped(folder) or str(folder) != picture.settings.model or (
            folder.exists()):
        return folder
    if fingerprint(open_network(None)[0]) == picture.settings.model_sha256:
        return None
    lora = f", and {options.lora} as lora" if options.lora is not None else ""
    raise FileNotFoundError(
        f"{options.like} was made by {folder}, which is not here: name the model's folder as MODEL{lora}")
