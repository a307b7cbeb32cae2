"""Calibration sets for the U-Net of a diffusers pipeline, and what training one needs: latents, conditions.

    xt = scheduler.add_noise(x0, eps, t)        of images by the pipeline's autoencoder, at times drawn evenly
    xt = a state of the pipeline's own sampling, with its guidance, where there are no images

Prompts go through the pipeline's own text encoders: SD's, and both of SDXL's with its sizes and crops.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from lamamba.compression.calibration import BATCH_SIZE, LABEL_DROPOUT, Batch, Calibration
from lamamba.data.autoencoder import pixels_per_latent
from lamamba.data.codec import CodecConfig
from lamamba.diffusion.schedule import NUM_TIMESTEPS


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when all are blank.
    """
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts; write one a line")
    return prompts


def training_scheduler(pipe: DiffusionPipeline) -> DDPMScheduler:
    """The noise of the pipeline's own scheduler, and what its network predicts.

    Raises:
        ValueError: for flow matching and others that are not diffusion in discrete steps.
    """
    config = pipe.scheduler.config
    if "beta_schedule" not in config or config.get("prediction_type", "epsilon") not in _TARGETS:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} with prediction_type={config.get('prediction_type')!r} is not supported: "
            f"{', '.join(_TARGETS)} are"
        )
    return DDPMScheduler.from_config(config)


_TARGETS = {
    "epsilon": lambda scheduler, x0, eps, t: eps,
    "v_prediction": lambda scheduler, x0, eps, t: scheduler.get_velocity(x0, eps, t),
    "sample": lambda scheduler, x0, eps, t: x0,
}


def target(scheduler: DDPMScheduler, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict for xt = scheduler.add_noise(x0, eps, t)."""
    return _TARGETS[scheduler.config["prediction_type"]](scheduler, x0, eps, t)


def image_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels of the images that the U-Net was made for."""
    size, vae = pipe.unet.config["sample_size"], getattr(pipe, "vae", None)
    if size is None:
        raise ValueError("the U-Net's configuration has no sample_size; set unet.config.sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    factor = 1 if vae is None else pixels_per_latent(vae.config)
    return height * factor, width * factor


@torch.no_grad()
def encode_images(pipe: DiffusionPipeline, images: Sequence[Image.Image]) -> Tensor:
    """x0 (b, c, h, w) float32 of images, which are scaled and cropped at the centre: scaled latents, or pixels.

    Raises:
        ValueError: when the U-Net takes other channels.
    """
    vae, (height, width) = getattr(pipe, "vae", None), image_size(pipe)
    channels = pipe.unet.config["in_channels"] if vae is None else vae.config["in_channels"]
    fitted = [
        ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
        for image in images
    ]
    x0 = VaeImageProcessor(do_resize=False).preprocess(fitted)
    if vae is not None:
        dtype = vae.dtype
        if dtype != torch.float32:
            vae.to(torch.float32)                                               # SDXL's overflows in float16
        mean = vae.encode(x0.to(vae.device)).latent_dist.mode()
        if dtype != torch.float32:
            vae.to(dtype)
        x0 = CodecConfig.of_config(vae.config).to_x0(mean).cpu()
    if x0.shape[1] != pipe.unet.config["in_channels"]:
        raise ValueError(
            f"images become {x0.shape[1]} channels, the U-Net takes {pipe.unet.config['in_channels']}: calibrate such "
            "pipelines (inpainting and the like) by inputs of your own, as batches of a Calibration"
        )
    return x0


@torch.no_grad()
def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Any]:
    """The U-Net's arguments for prompts, "" for none, by the pipeline's text encoders; on its device.

    Raises:
        ValueError: when the pipeline encodes no prompts.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} encodes no prompts; leave them out")
    config = pipe.unet.config
    found = pipe.encode_prompt(
        prompt=list(prompts), device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    inputs = {"encoder_hidden_states": found[0]}
    if config["addition_embed_type"] != "text_time":
        return inputs
    text, pooled = found[0], found[2]
    if pipe.config.get("force_zeros_for_empty_prompt", False):                  # as guidance asks the network
        given = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
        text, pooled = text * given[:, None, None], pooled * given[:, None]
    number = (config["projection_class_embeddings_input_dim"] - pooled.shape[1]) // config["addition_time_embed_dim"]
    size = [float(side) for side in image_size(pipe)]
    ids = [*size, 0.0, 0.0, *size] if number == 6 else [*size, 0.0, 0.0, 6.0]   # the refiner takes an aesthetic score
    time_ids = torch.tensor([ids] * len(prompts), dtype=text.dtype, device=text.device)
    return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def from_pipeline(
    pipe: DiffusionPipeline, *, images: Sequence[Image.Image] | None = None, prompts: Sequence[str] = (),
    labels: Sequence[int] = (), samples: int = 512, seed: int = 0, times: tuple[float, float] = (0, NUM_TIMESTEPS),
    batch_size: int = BATCH_SIZE, steps: int | None = None,
) -> Calibration:
    """Images with noise, a tenth without their prompt; without images, states of the pipeline's own sampling.

    Args:
        pipe: with a U-Net of diffusers as `unet`.
        images: of any size; they may repeat where there are fewer than samples.
        prompts: of the images, one each; without images in turn, for pipelines that take prompts.
        labels: of the images, for class-conditional U-Nets.
        samples: how many.
        seed: of order, noise, times and dropped prompts.
        times: lowest and highest timestep, 0 (clean) .. 1000 (noise).
        batch_size: samples at a time.
        steps: of sampling, the pipeline's default.

    Raises:
        ValueError: when images, prompts and pipeline do not fit together, or no step of sampling lies in the times.
    """
    wants = {"prompts": "cross_attention_dim" in pipe.unet.config, "labels": _has_labels(pipe)}
    for name, given in {"prompts": prompts, "labels": labels}.items():
        if wants[name] != bool(given) and (images is not None or name == "prompts"):
            has = "needs" if wants[name] else "takes no"
            raise ValueError(f"this U-Net {has} {name}, {len(given)} came")
        if images is not None and given and len(given) != len(images):
            raise ValueError(f"{len(images)} images came with {len(given)} {name}; give each its own")
    about = {"samples": samples, "seed": seed, "times": list(times)}
    generator = torch.Generator().manual_seed(seed)
    if images is None:
        if _has_labels(pipe):
            raise ValueError("class-conditional pipelines need images and labels: their sampling is not recorded here")
        batches = [
            _sampled(pipe, prompts, range(first, min(first + batch_size, samples)), seed, times, steps, generator)
            for first in range(0, samples, batch_size)
        ]
        about |= {"data": f"states of {type(pipe).__name__} with {type(pipe.scheduler).__name__}"}
    else:
        if not images:
            raise ValueError("images is empty: give some, or None for states of the pipeline's own sampling")
        order = [torch.randperm(len(images), generator=generator) for _ in range(-(-samples // len(images)))]
        chosen = torch.cat(order)[:samples].split(batch_size)
        batches = [_noised(pipe, images, prompts, labels, rows.tolist(), times, generator) for rows in chosen]
        about |= {"data": f"{len(images)} images", "fingerprint": _fingerprint(images, prompts, labels)}
    return Calibration(batches, prediction_channels(pipe), about)


def _fingerprint(images: Sequence[Image.Image], prompts: Sequence[str], labels: Sequence[int]) -> str:
    digest = hashlib.sha256(repr((list(prompts), list(labels))).encode())
    for image in images:
        digest.update(f"{image.size} {image.mode}".encode() + image.tobytes())
    return digest.hexdigest()


def prediction_channels(pipe: DiffusionPipeline) -> int:
    """Channels of the U-Net's output without a learned variance."""
    into, out = pipe.unet.config["in_channels"], pipe.unet.config["out_channels"]
    return into if out == 2 * into else out


def _has_labels(pipe: DiffusionPipeline) -> bool:
    return pipe.unet.config["class_embed_type"] is not None or pipe.unet.config["num_class_embeds"] is not None


def _noised(
    pipe: DiffusionPipeline, images: Sequence[Image.Image], prompts: Sequence[str], labels: Sequence[int],
    rows: Sequence[int], times: tuple[float, float], generator: torch.Generator,
) -> Batch:
    scheduler, (low, high), b = training_scheduler(pipe), times, len(rows)
    x0 = encode_images(pipe, [images[row] for row in rows])
    eps = torch.randn(x0.shape, generator=generator)
    share = (low + (high - low) * torch.rand(b, generator=generator)) / NUM_TIMESTEPS
    steps = scheduler.config["num_train_timesteps"]
    t = (share * steps).long().clamp(max=steps - 1)
    dropped = (torch.rand(b, generator=generator) < LABEL_DROPOUT).tolist()
    xt, wanted, channels = scheduler.add_noise(x0, eps, t), target(scheduler, x0, eps, t), prediction_channels(pipe)
    inputs: dict[str, Any] = {"sample": xt.to(pipe.unet.dtype), "timestep": t}
    if prompts:
        texts = ["" if drop else prompts[row] for row, drop in zip(rows, dropped, strict=True)]
        inputs |= send_to_device(encode_prompts(pipe, texts), "cpu")
    if labels:
        inputs["class_labels"] = torch.tensor([labels[row] for row in rows])

    def loss(output: Tensor) -> Tensor:
        return (output[:, :channels].float().cpu() - wanted).square().flatten(1).mean(1)

    return Batch(inputs, t.float() / steps * NUM_TIMESTEPS, loss)


def _sampled(
    pipe: DiffusionPipeline, prompts: Sequence[str], numbers: range, seed: int, times: tuple[float, float],
    steps: int | None, generator: torch.Generator,
) -> Batch:
    """One forward pass of each image's sampling, drawn evenly from those in the times; with and without its prompt."""
    signature, b, seen = inspect.signature(pipe.unet.forward), len(numbers), 0
    kept: list[dict[str, Any]] = [{}] * b
    scale = NUM_TIMESTEPS / pipe.scheduler.config["num_train_timesteps"]

    def record(_: Any, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        nonlocal seen
        inputs = signature.bind(*args, **more).arguments
        rows = inputs["sample"].shape[0]
        t = torch.as_tensor(inputs["timestep"]).detach().cpu().float().expand(rows)
        if times[0] <= float(t[0]) * scale <= times[1]:
            seen += 1
            halves = torch.randint(rows // b, (b,), generator=generator)        # guidance: without prompts, and with
            for row in (torch.rand(b, generator=generator) < 1 / seen).nonzero().flatten().tolist():
                place = row + b * int(halves[row])
                kept[row] = {"timestep": t[place : place + 1], **_row(inputs, place, rows)}

    arguments: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed + number) for number in numbers]}
    accepted = inspect.signature(pipe.__call__).parameters
    if prompts:
        arguments |= {"prompt": [prompts[number % len(prompts)] for number in numbers], "output_type": "latent"}
    else:
        arguments |= {"batch_size": b, "output_type": "np"}
    if steps is not None:
        arguments["num_inference_steps"] = steps
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.unet.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipe(**{name: value for name, value in arguments.items() if name in accepted})
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"no step of sampling lies between the times {times[0]:g} and {times[1]:g}; widen them")
    inputs = _stacked(kept)
    return Batch(inputs, inputs["timestep"] * scale)


def _row(inputs: Mapping[str, Any], place: int, rows: int) -> dict[str, Any]:
    """One row of the arguments that have one for each sample."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            found[name] = _row(value, place, rows)
        elif isinstance(value, Tensor) and value.dim() and len(value) == rows and name != "timestep":
            found[name] = value[place : place + 1].detach().cpu()
    return {name: value for name, value in found.items() if not isinstance(value, dict) or value}


def _stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: _stacked(values) if isinstance(values[0], dict) else torch.cat(values)
        for name, values in columns.items()
    }
