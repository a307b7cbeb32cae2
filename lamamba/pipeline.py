"""LaMambaPipeline: a diffusers pipeline."""

# no `from __future__ import annotations`: diffusers reads the constructor's types
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from lamamba.config import check_known
from lamamba.data.autoencoder import pixels_per_latent
from lamamba.data.codec import CodecConfig, check_pixels, to_uint8
from lamamba.data.images import BadImage, eight_bits, opaque
from lamamba.data.labels import as_names, find_label
from lamamba.diffusion.denoise import (
    SAMPLERS,
    Known,
    Step,
    check_scheduler,
    default_steps,
    denoise,
    first_step,
    make_scheduler,
    samplers_for,
    set_steps,
    slerp,
)
from lamamba.diffusion.guidance import Guidance, GuidedChannels, check_guidance
from lamamba.models.unet import LaMambaUNet
from lamamba.pretrained import is_shipped
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import EMA, PIPELINE_INDEX, Model, open_model
from lamamba.sampling.generate import GuidedModel, resized
from lamamba.utils.text import shown

logger = logging.getLogger("lamamba.pipeline")

MAX_BATCH = 10_000
"""Images of each label in a call, which makes them all at once: more are a mistake."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIPELINE_CODE = '''\
"""For diffusers: DiffusionPipeline.from_pretrained(this folder, custom_pipeline="pipeline", trust_remote_code=True)."""

from lamamba.pipeline import LaMambaPipeline

__all__ = ["LaMambaPipeline"]
'''
"""Content of pipeline.py in a saved pipeline, by which diffusers finds the class."""

Generators = torch.Generator | list[torch.Generator] | None
KINDS: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("generator", "variation_generator"), (
        torch.Generator, "a torch.Generator, or a list with one for each image")),
    "latents": (Tensor, "a tensor (b, c, h, w)"),
    "guidance_model": (torch.nn.Module, "a network, such as lamamba.open_model(PLACE).network"),
    "callback_on_step_end": (Callable, "a function"),
    **dict.fromkeys(("strength", "variation_strength"), (Real, "a number, 0 to 1")),
    "num_images_per_label": (Integral, "a whole number"),
}
"""Of arguments of a call: type, and what fits in words."""


def _check_kinds(**given: Any) -> None:
    for name, value in given.items():
        kind, fits = KINDS[name]
        values = value if kind is torch.Generator and isinstance(value, list) else [value]
        if not all(isinstance(each, kind) for each in values) and not (value is None and kind not in (Real, Integral)):
            raise ValueError(f"{name}={shown(value)} must be {fits}")


class LaMambaPipeline(DiffusionPipeline):
    """Sample images from a LaMamba-Diff network, as a diffusers pipeline.

        pipe = LaMambaPipeline.from_pretrained("exported").to("cuda")
        image = pipe("tabby", generator=torch.Generator().manual_seed(0)).images[0]

    Args:
        unet: the network; its objective decides which schedulers fit.
        vae: a diffusers autoencoder for a network of latents; None for a network of pixels.
        scheduler: any of diffusers' that fits the objective, by default its first sampler's; see also `set_sampler`.
        id2label: names of the classes by number; several words for one class with commas.
        codec: scale, shift, latents_mean and latents_std of the latents that the network was trained with; by default
            as the vae's configuration says.
        guidance_scale: the model's own, which calls take by default; None: 2 with classes, 1 without; of a flow map
            the lowest of its range.

    Raises:
        ValueError: when network, vae and id2label do not fit together.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae", "scheduler"]                                 # noqa: RUF012 (diffusers' own form)
    _callback_tensor_inputs = ["latents", "x0"]                                 # noqa: RUF012

    def __init__(
        self,
        unet: LaMambaUNet,
        vae: ModelMixin | None = None,
        scheduler: SchedulerMixin | None = None,
        id2label: dict | None = None,
        codec: dict | None = None,
        guidance_scale: float | None = None,
    ):
        super().__init__()
        config = unet.config
        names = as_names(id2label, config["num_classes"])
        self._check_vae(unet, vae, codec)
        objective = config["objective"]
        if objective == "flow-map":
            guidance_scale = unet.architecture.lowest_guidance if guidance_scale is None else guidance_scale
            unet.architecture.check_guidance(guidance_scale)
        scheduler = scheduler or make_scheduler(samplers_for(objective)[0], objective)
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(
            id2label=dict(enumerate(names)) if names else None, codec=dict(codec) if codec else None,
            guidance_scale=guidance_scale,
        )
        self._names = names
        self._interrupt = False
        self._guidance_scale = 1.0

    @staticmethod
    def _check_vae(unet: LaMambaUNet, vae: ModelMixin | None, codec: Mapping[str, Any] | None) -> None:
        channels = unet.config["in_channels"]
        if vae is None:
            if codec:
                raise ValueError("codec was given without a vae; a network of pixels needs neither")
            return
        latent_channels = vae.config.get("latent_channels")
        if latent_channels is not None and latent_channels != channels:
            raise ValueError(f"the vae makes latents of {latent_channels} channels, the network reads {channels}")
        known = ("scale", "shift", "latents_mean", "latents_std")
        for key in codec or {}:
            check_known("codec entry", key, known)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, as safetensors in shards where large, with pipeline.py beside (see PIPELINE_CODE).

        Raises:
            ValueError: when the weights are to be pickled.
        """
        if not kwargs.get("safe_serialization", True) or (args and not args[0]):
            raise ValueError("safe_serialization=False would pickle the weights; only safetensors are written")
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "pipeline.py"), "w", encoding="utf-8") as file:
            file.write(PIPELINE_CODE)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, ema: EMA | None = None, autoencoder: str | None = None,
        **kwargs: Any,
    ) -> "LaMambaPipeline":
        """Load a saved pipeline as diffusers does, but only safetensors, and the network strictly.

        A run folder, a checkpoint, a saved network and "shipped" are loaded, too, as by `lamamba.open_model`.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            ema, autoencoder: see `lamamba.open_model`; not for pipelines.
            kwargs: as in diffusers; of those only dtype (torch_dtype) for what is not a pipeline.

        Raises:
            ValueError: when the network's weights do not fit its configuration; every tensor is named.
            OSError: when there is no such pipeline.
        """
        path = Path(pretrained_model_name_or_path)
        is_run_or_network = path.is_dir() and not (path / PIPELINE_INDEX).is_file()
        if is_run_or_network or is_shipped(path):
            dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", torch.float32))
            if kwargs:
                raise ValueError(f"{path} is not a pipeline: leave {', '.join(kwargs)} out")
            pipe = build_pipeline(open_model(path, ema=ema, autoencoder=autoencoder))
            for part in filter(None, (pipe.unet, pipe.vae)):
                torch.nn.Module.to(part, dtype)
            return pipe
        if ema is not None or autoencoder is not None:
            raise ValueError(f"{path} is a pipeline: it has one set of weights and its own autoencoder")
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the weights on the CPU and bring each block's to the accelerator when it runs: slow, but small."""
        self._exclude_from_cpu_offload = ["unet"]
        super().enable_sequential_cpu_offload(gpu_id, device)
        self._exclude_from_cpu_offload = []
        execution_device = self.unet.device
        accelerate.cpu_offload(
            self.unet.to("cpu"), execution_device, preload_module_classes=LaMambaUNet._no_split_modules
        )

    def enable_vae_slicing(self) -> None:
        """Decode one image at a time, for less memory."""
        self._slicing_vae("slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all images at once again."""
        self._slicing_vae("slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles, for less memory."""
        self._slicing_vae("tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode images whole again."""
        self._slicing_vae("tiling").disable_tiling()

    def _slicing_vae(self, what: str) -> Any:
        if self.vae is None:
            raise ValueError(f"this pipeline makes pixels without a vae: there is no {what} to set")
        return self.vae

    @property
    def label_names(self) -> tuple[str, ...]:
        """One name per class; empty where the model has none."""
        return self._names

    @property
    def codec_config(self) -> CodecConfig:
        """How the network's images are made of the vae's latents."""
        if self.vae is None:
            return CodecConfig()
        if self.config.codec is None:
            return CodecConfig.of_config(self.vae.config)
        values = dict(self.config.codec)
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list | tuple) else v for key, v in values.items()}
        return CodecConfig(codec="latents", **plain)

    @property
    def pixels_per_input(self) -> int:
        """Side in image pixels of one pixel of the network's input: 1, or what the vae makes of one latent."""
        return 1 if self.vae is None else pixels_per_latent(self.vae.config)

    @property
    def interrupt(self) -> bool:
        """Set pipe._interrupt = True, in a callback, to end sampling after the step."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Of the running or last call. Set pipe._guidance_scale, in a callback, to change it for the next steps."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the network in the last call."""
        return self._num_timesteps

    def set_sampler(self, name: str) -> None:
        """Take a scheduler by its short name: ddpm, ddim, dpm++, dpm++-sde, unipc, euler, heun; flow-euler, ...

        Raises:
            ValueError: for an unknown name, or one that does not fit the network; the right ones are named.
        """
        objective = self.unet.config["objective"]
        steps = SAMPLERS[name].default_steps if name in SAMPLERS else None
        self.scheduler = make_scheduler(name, objective, steps)

    def get_label_ids(self, labels: int | str | Sequence[int | str]) -> list[int]:
        """Class numbers of numbers or names.

        Raises:
            ValueError: for a number out of range or an unknown name; near ones are named.
        """
        is_one = isinstance(labels, str | bytes) or not isinstance(labels, Sequence)
        wanted: Any = np.ravel(labels).tolist() if is_one else labels
        return [find_label(label, self._names, self.unet.config["num_classes"]) for label in wanted]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        num_images_per_label: int = 1,
        num_images_per_prompt: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_channels: GuidedChannels = "all",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guidance_model: LaMambaUNet | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        variation_generator: Generators = None,
        variation_strength: float = 0.0,
        image: Any = None,
        strength: float = 1.0,
        mask_image: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Make one image, or num_images_per_label, of each label.

        Args:
            class_labels: class numbers or names, one or several; None for a network without classes.
            num_images_per_label: images of each label, side by side in the output.
            num_images_per_prompt: the same, under diffusers' name.
            num_inference_steps: by default what the scheduler's kind usually takes.
            guidance_scale: scale of guidance; 1 is none and costs half. By default the model's own, else
                2 (for a network without classes 1, unless it is guided by another). Of a flow map, an input.
            guidance_channels: "all" (the paper's code) or "first-three" (DiT's).
            guidance_interval: guide only at timesteps / 1000 between these; 1 is noise.
            guidance_rescale: 0 .. 1, how much of the conditional prediction's deviation each image gets back.
            guidance_model: a guiding model: smaller, or from earlier in the training, instead of
                "no class" (autoguidance).
            height, width: of the images in pixels; by default as the network was trained.
            generator: a list, one per image, makes each image depend on its own alone; one alone serves the batch.
            latents: (b, c, h, w) standard normal noise to start from, instead of the generator's.
            variation_generator, variation_strength: the noise goes from the generator's (0) to this one's (1) along the
                sphere: pictures that resemble the first.
            image: image-to-image: PIL images, arrays or tensors in 0 .. 1 to start from.
            strength: in (0, 1], the share of the steps that are done on image; 1 keeps nothing of it.
            mask_image: inpainting: white (1) where image is to be made anew, black (0) where it stays.
            output_type: "pil", "np" (b, h, w, c) in 0 .. 1, "pt" (b, c, h, w) in 0 .. 1, or "latent" (x0).
            return_dict: False gives the tuple (images,).
            callback_on_step_end: called as diffusers' are, with the tensors named below; "latents" that it returns take
                the place of those.
            callback_on_step_end_tensor_inputs: of "latents" and "x0", the clean image as predicted in the step.

        Returns:
            ImagePipelineOutput, with .images.

        Raises:
            ValueError: when labels, sizes, scheduler or the other arguments do not fit the model or each other.
            FloatingPointError: when the network or the vae makes NaN or infinities.
        """
        self._check_call(output_type, image, strength, mask_image, guidance_model)
        names = self._tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        per_label = num_images_per_label if num_images_per_prompt is None else num_images_per_prompt
        labels, count = self._find_labels(class_labels, per_label, generator, latents)
        if guidance_scale is None:
            guidance_scale = default_guidance(self.config.guidance_scale, bool(labels) or guidance_model is not None)
        guidance = Guidance(guidance_scale, guidance_channels, guidance_interval, guidance_rescale)
        check_guidance(self.unet.architecture, guidance, has_guiding_model=guidance_model is not None)
        size = self.unet.architecture.fit_input(height, width, self.pixels_per_input)

        device = self._execution_device
        noise = self._noise(count, size, generator, latents, device)
        noise = self._vary(noise, size, variation_generator, variation_strength)
        default = default_steps(self.scheduler, self.unet.config["objective"])
        set_steps(self.scheduler, default if num_inference_steps is None else num_inference_steps)
        start = None if image is None else self._encode(image, size, count, device)
        known = None if mask_image is None or start is None else Known(start, self._mask(mask_image, size, start))
        first = 0 if start is None else first_step(self.scheduler, strength)
        timesteps = self.scheduler.timesteps[first:].tolist()
        self._num_timesteps, self._interrupt, self._guidance_scale = len(timesteps), False, guidance.scale
        with resized([self.unet, guidance_model], size), self.progress_bar(total=self._num_timesteps) as bar:

            def on_step(step: Step) -> Tensor | None:
                bar.update()
                return self._call_back(callback_on_step_end, names, step)

            model = GuidedModel(self.unet, timesteps, guidance, guiding_model=guidance_model)
            predict = model.predictor(labels, device, scale=lambda: self._guidance_scale)
            x0 = denoise(predict, self.scheduler, noise, generators=generator, first=first, start=start, known=known,
                         on_step=on_step, interrupted=lambda: self._interrupt)
        images = self._finish(x0, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _tensor_inputs(self, callback: Any, names: Sequence[str]) -> Sequence[str]:
        """The tensors that a callback takes: those that it names itself, else the given names."""
        _check_kinds(callback_on_step_end=callback)
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ValueError(f"callback_on_step_end_tensor_inputs={shown(names)} must be a list of names")
        for name in names:
            check_known("callback tensor", name, self._callback_tensor_inputs)
        return names

    def _check_call(self, output_type: str, image: Any, strength: float, mask_image: Any, guidance_model: Any) -> None:
        _check_kinds(strength=strength, guidance_model=guidance_model)
        if guidance_model is not None and not hasattr(guidance_model, "architecture"):
            raise ValueError(f"guidance_model is a {type(guidance_model).__name__}, and no network of lamamba")
        check_known("output_type", output_type, OUTPUT_TYPES)
        check_scheduler(self.scheduler, self.unet.config["objective"])
        if image is None and (mask_image is not None or strength != 1):
            raise ValueError("strength and mask_image change an image: give image, too")

    def _call_back(self, callback: Callable[..., dict] | None, names: Sequence[str], step: Step) -> Tensor | None:
        """Call a callback as diffusers does; the latents that it returns, if any."""
        if callback is None:
            return None
        tensors = {"latents": step.x, "x0": step.x0}
        given = {name: tensors[name] for name in names}
        returned = callback(self, step.done - 1, step.timestep, given) or {}
        if not isinstance(returned, Mapping):
            raise ValueError(f"callback_on_step_end returned {shown(returned)}: give a dict of tensors, or nothing")
        changed = returned.get("latents")
        if changed is not None:
            if not isinstance(changed, Tensor):
                raise ValueError(f"callback_on_step_end returned latents={shown(changed)}: give a tensor")
            _check_tensor("latents of callback_on_step_end", changed)
            if changed.shape != step.x.shape:
                raise ValueError(f"callback_on_step_end returned latents of shape {tuple(changed.shape)}, and not "
                                 f"{tuple(step.x.shape)} as it got")
        return changed

    def _find_labels(
        self, class_labels: Any, per_label: int, generator: Generators, latents: Tensor | None
    ) -> tuple[list[int] | None, int]:
        """Labels image by image (None without classes), and how many images there are to be."""
        _check_kinds(num_images_per_label=per_label, latents=latents)
        if isinstance(per_label, bool) or not 1 <= per_label <= MAX_BATCH:
            raise ValueError(f"num_images_per_label={per_label} must be 1 to {MAX_BATCH:,}, a batch of one call")
        if latents is not None:
            _check_tensor("latents", latents)
        if self.unet.config["num_classes"] == 0:
            if class_labels is not None:
                raise ValueError("this model has no classes: leave class_labels out")
            given = len(generator) if isinstance(generator, list) else None
            if given is None and latents is not None and latents.ndim:
                given = len(latents)
            return None, given or per_label
        if class_labels is None:
            raise ValueError(
                f"class_labels are missing: give numbers in 0 .. {self.unet.config['num_classes'] - 1}"
                f"{' or names such as ' + repr(self._names[0].split(', ')[0]) if self._names else ''}"
            )
        labels = [label for label in self.get_label_ids(class_labels) for _ in range(per_label)]
        if not labels:
            raise ValueError("class_labels is empty: give at least one")
        return labels, len(labels)

    def _noise(
        self, count: int, size: tuple[int, int], generator: Generators, latents: Tensor | None, device: torch.device
    ) -> Tensor:
        _check_kinds(generator=generator)
        shape = (count, self.unet.config["in_channels"], *size)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators came for {count} images; give one for each, or a single one")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, {count} images of this size need {shape}")
        latents = latents.to(device, torch.float32)
        if not latents.isfinite().all():
            raise ValueError("latents hold NaN or infinities")
        return latents

    def _vary(self, noise: Tensor, size: tuple[int, int], generator: Generators, strength: float) -> Tensor:
        """Noise between the given one (strength 0) and the generator's (1), along the sphere."""
        _check_kinds(variation_strength=strength, variation_generator=generator)
        if not strength:
            return noise
        if generator is None or not 0 <= strength <= 1:
            raise ValueError(f"variation_strength={strength} must lie in 0 .. 1 and needs variation_generator")
        return slerp(noise, self._noise(len(noise), size, generator, None, noise.device), strength)

    @staticmethod
    def _processor(*, is_grey: bool, **more: bool) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=not is_grey, do_convert_grayscale=is_grey, **more)

    def _encode(self, image: Any, size: tuple[int, int], count: int, device: torch.device) -> Tensor:
        """x0 (count, c, h, w) of images."""
        channels = self.unet.config["in_channels"] if self.vae is None else self.vae.config.get("in_channels", 3)
        height, width = (side * self.pixels_per_input for side in size)
        pixels = self._processor(is_grey=channels == 1).preprocess(
            _shares(image, "image", "white"), height=height, width=width
        )
        if pixels.shape[1] != channels:
            raise ValueError(f"image has {pixels.shape[1]} channels, this model's pictures have {channels}")
        pixels = _repeated(pixels, count, "image")
        if self.vae is None:
            return pixels.to(device, torch.float32)
        with self._upcast():
            encoded = self.vae.encode(pixels.to(device, self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            z = encoded.latent_dist.mode()
        else:
            z = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        return self.codec_config.to_x0(z.float())

    def _mask(self, mask: Any, size: tuple[int, int], start: Tensor) -> Tensor:
        """(b, 1, h, w) for start (b, c, h, w): 1 wherever any pixel below a point of it is to be made anew."""
        processor = self._processor(is_grey=True, do_normalize=False, do_binarize=True)
        height, width = (side * self.pixels_per_input for side in size)
        shares = _shares(mask, "mask_image", "black")
        pixels = processor.preprocess(shares, height=height, width=width)[:, :1]
        return _repeated(F.adaptive_max_pool2d(pixels, size), len(start), "mask_image").to(start)

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        """Run the vae in float32 where float16 overflows, as force_upcast in its configuration says."""
        vae: Any = self.vae
        needed = vae.dtype == torch.float16 and vae.config.get("force_upcast") and vae.device.type != "meta"
        if needed:
            torch.nn.Module.to(vae, torch.float32)
        try:
            yield
        finally:
            if needed:
                torch.nn.Module.to(vae, torch.float16)

    def _finish(self, x0: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x0
        if self.vae is not None:
            with self._upcast():
                z = self.codec_config.to_latents(x0).to(self.vae.dtype)
                x0 = self.vae.decode(z, return_dict=False)[0].float()
            check_pixels(x0, f"the vae in {self.vae.dtype}")
        if output_type == "pil":
            levels = to_uint8(x0)
            return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in levels]
        shares = (x0 / 2 + 0.5).clamp(0, 1)
        return shares if output_type == "pt" else shares.permute(0, 2, 3, 1).cpu().numpy()


def build_pipeline(
    model: Model, sampler: str | None = None, label_names: Sequence[str] | None = None,
    guidance_scale: float | None = None,
) -> LaMambaPipeline:
    """A pipeline of an open model, with no path of this disk in its configuration.

    Args:
        model: on the CPU.
        sampler: a name from lamamba.diffusion.denoise.SAMPLERS; by default the objective's first.
        label_names: one per class; by default those of the model's metadata.
        guidance_scale: by default that of the model's metadata.

    Raises:
        ValueError: when one of them does not fit the model.
    """
    config, metadata = model.network.architecture, model.metadata
    scheduler = make_scheduler(sampler or samplers_for(config.objective)[0], config.objective)
    names = metadata.label_names if label_names is None else label_names
    vae: Any = None
    codec = None
    if model.decoder is not None:
        autoencoder = model.decoder.autoencoder
        if metadata.autoencoder_sha256 not in (None, autoencoder.sha256):
            logger.warning("trained on latents of %s, decoded by another: %s", metadata.autoencoder, autoencoder)
        vae, keys = autoencoder.network, ("scale", "shift", "latents_mean", "latents_std")
        configured, trained = CodecConfig.of_config(autoencoder.config), dataclasses.asdict(metadata)
        if any(getattr(configured, key) != trained[key] for key in keys):
            codec = {key: trained[key] for key in keys}
    network: Any = model.network                                                # of types that diffusers hides
    for part in filter(None, (network, vae)):
        part.register_to_config(_name_or_path="")
    scale = metadata.guidance if guidance_scale is None else guidance_scale
    return LaMambaPipeline(network, vae, scheduler, dict(enumerate(names)) if names else None, codec, scale)


PICTURES = (Image.Image, np.ndarray, Tensor)
"""What image and mask_image may be, or lists of them."""


def _shares(images: Any, name: str, background: str) -> Any:
    """What the argument image or mask_image holds, arrays and tensors as shares of 0 .. 1.

    PIL images come back upright, of 8 bits and without transparency. Bytes are divided by 255, those of masks where one
    is above 1.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise ValueError(f"{name} is an empty list: give one for all images, or one for each")
        if not any(all(isinstance(image, kind) for image in images) for kind in PICTURES):
            raise ValueError(f"{name} must be a list of one kind: PIL images, arrays or tensors")
        read = [_shares(image, name, background) for image in images]
        shapes = {tuple(image.shape) for image in read if not isinstance(image, Image.Image)}
        if len({(len(shape), shape[-3:]) for shape in shapes}) > 1:
            raise ValueError(f"{name} has arrays of several shapes, {sorted(shapes)}: bring them to one size first")
        return read
    if not isinstance(images, PICTURES):
        raise ValueError(f"{name}={shown(images)} must be a PIL image, an array or a tensor, or a list of them; "
                         "PIL.Image.open opens a file")
    if isinstance(images, Tensor):
        _check_tensor(name, images)
    shape = images.size if isinstance(images, Image.Image) else tuple(images.shape)
    if 0 in shape:
        raise ValueError(f"{name} has no pixels: its size is {shape}")
    if isinstance(images, Image.Image):
        try:
            return opaque(eight_bits(images)[0], background)
        except BadImage as error:
            raise ValueError(f"{name}: {error}") from error
    if not 2 <= len(shape) <= 4:
        raise ValueError(f"{name} has the shape {shape}: arrays are (h, w), (h, w, c) or (b, h, w, c), "
                         "tensors (c, h, w) or (b, c, h, w)")
    return _array_shares(images, name)


def _array_shares(images: Any, name: str) -> Any:
    """An array or a tensor as shares of 0 .. 1, in float32."""
    is_tensor, is_mask = isinstance(images, Tensor), name == "mask_image"
    kind = str(images.dtype).removeprefix("torch.") if is_tensor else images.dtype.name
    if "float" not in kind and kind not in ("uint8", "bool"):
        raise ValueError(f"{name} of {kind} is ambiguous: arrays and tensors hold shares, 0 to 1, or bytes (uint8)")
    scale = 255 if kind == "uint8" and (not is_mask or images.max() > 1) else 1
    shares = (images.float() if is_tensor else images.astype(np.float32)) / scale     # bfloat16 has none just above 1
    if not ((shares > -0.001) & (shares < 1.001)).all():
        raise ValueError(f"{name} has numbers from {float(shares.min()):.4g} to {float(shares.max()):.4g}: arrays and "
                         "tensors hold shares, 0 to 1, or bytes (uint8)")
    return shares


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds plain numbers that can be read."""
    faults = {
        "nested": tensor.is_nested, "quantized": tensor.is_quantized, "sparse": tensor.layout is not torch.strided,
        "on meta, without values": tensor.is_meta, "complex": tensor.is_complex(),
    }
    if fault := next((words for words, is_so in faults.items() if is_so), None):
        raise ValueError(f"{name}: the tensor is {fault}; give a dense one of real numbers")


def _repeated(images: Tensor, count: int, name: str) -> Tensor:
    if count % len(images):
        raise ValueError(f"{len(images)} of {name} came for {count} images; give one, or one for each")
    return images.repeat_interleave(count // len(images), dim=0)
