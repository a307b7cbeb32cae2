"""Image sets to evaluate: existing ones, and those that networks sample while they are evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamamba.data.digits import SIDE
from lamamba.diffusion.denoise import make_scheduler, samplers_for
from lamamba.evaluation.images import ArrayImages, DigitImages, FolderImages, GeneratedImages, Images, NpzImages
from lamamba.evaluation.reference import is_statistics, load_statistics
from lamamba.inference.quantizing import check_quantization
from lamamba.options.evaluation import NUM_IMAGES, EvaluateOptions
from lamamba.pretrained import is_shipped, shipped_model
from lamamba.runs.folder import CheckpointState, RunFolder
from lamamba.runs.model import EMA, PIPELINE_INDEX, Model, list_averages, open_model
from lamamba.sampling.generate import ImageGenerator
from lamamba.sampling.labels import label_of
from lamamba.sampling.plan import NPZ, SHARDS, UNFINISHED, find_plan
from lamamba.sampling.prepare import cache_config
from lamamba.utils.text import counted

OF_MODELS = (
    "repeats", "every_checkpoint", "ema", "guidance", "seed", "labels", "sampler", "steps", "autoencoder", "cache",
    "cache_order", "dtype", "quantize", "lora",
)
"""Options that only a model has."""


def open_images(
    name: str | np.ndarray, image_size: int | None = None, limit: int | None = None, channels: int | None = None
) -> Images:
    """Open existing images. The plan of a folder that `lamamba sample -n` has filled becomes part of the protocol.

    Args:
        name: "digits", an npz file, a folder, or an array of images.
        image_size: of "digits" (by default 8), and that to which files are cropped (by default they have one size).
        channels: to which these files are converted; by default all are as the first one.
        limit: use only so many, the first ones.

    Raises:
        FileNotFoundError, ValueError: when there are none, fewer than `limit`, or not all of them yet.
    """
    if not isinstance(name, str):
        images: Images = ArrayImages(name, limit)
        name = "the array"
    elif name == "digits":
        images = DigitImages(image_size or SIDE, limit)
    else:
        folder = Path(name).parent if Path(name).name == NPZ else Path(name)
        if is_model(folder):                                                    # sample grids are no images of a set
            raise ValueError(f"{name} is a run or a model, and these are to be images, such as lamamba sample -n makes")
        if (folder / UNFINISHED).is_dir():
            raise ValueError(f"lamamba sample has not filled {folder} yet; run it again, it goes on where it was")
        is_npz = name.endswith(".npz")
        made = NpzImages(name, limit) if is_npz else FolderImages(name, limit, image_size, channels)
        if (folder / SHARDS).is_file() and (plan := find_plan(folder)) is not None:
            made.metadata["made_by"] = plan.to_dict()
        images = made
    if limit is not None and len(images) < limit:
        has = counted(len(images), "image")
        raise ValueError(f"{name} has {has}, and num_images={limit} asks for more; leave it out")
    return images


def is_model(path: Path) -> bool:
    """Whether a path is a run, a checkpoint, a saved network, a pipeline, or "shipped"."""
    names = ("checkpoints", "state.json", "sampling.json", PIPELINE_INDEX)
    return is_shipped(path) or any((path / name).exists() for name in names) or any(
        path.glob("diffusion_pytorch_model*")
    )


@dataclass(frozen=True)
class Candidate:
    """One set of weights."""

    name: str
    path: Path
    """Run, checkpoint or model, as the user named it."""
    folder: Path
    """Checkpoint or model."""
    step: int | None = None
    ema: EMA | None = None
    """Which average; None for a model with one set of weights."""


def find_candidates(path: Path, ema: EMA | None = None, *, every: bool = False) -> list[Candidate]:
    """The sets of weights of a run, checkpoint or model.

    Args:
        path: a run (its newest checkpoint), a checkpoint, a model, or "shipped".
        ema: which average; by default the first, with `every` each.
        every: all checkpoints of a run.

    Raises:
        FileNotFoundError, ValueError: when there is none, or not such an average.
    """
    if (path / "checkpoints").is_dir():
        run = RunFolder(path)
        names = run.names()
        if not names:
            raise FileNotFoundError(f"{path} is a run without a checkpoint yet; train it further")
        folders = [run.checkpoints / name for name in (names if every else names[-1:])]
    elif every:
        raise ValueError(f"{path} is no run: every_checkpoint scores the checkpoints of a run's folder")
    else:
        folders = [shipped_model(str(path)) if is_shipped(path) else path]
    found = []
    for folder in folders:
        weights = list_averages(folder)
        if every and not weights:
            raise ValueError(f"{folder} is no whole checkpoint: move it out, every_checkpoint scores all of a run")
        averages = [average for average in weights if average != "none"]
        if not averages:
            found.append(Candidate(path.name or str(path), path, folder, ema=ema))
            continue
        step = CheckpointState.load(folder).step
        for average in [ema] if ema is not None else averages if every else averages[:1]:
            name = f"{step}" + (f" ema {average}" if every and len(averages) > 1 else "")
            found.append(Candidate(name, path, folder, step, average))
    return found


@dataclass(frozen=True)
class SampleSet:
    """One set of weights at one guidance scale, or existing images."""

    name: str
    runs: list[Images]
    """For each seed range."""
    step: int | None = None
    ema: EMA | None = None
    guidance: float | None = None
    architecture: dict[str, Any] | None = None
    """Of the network."""


def find_sample_sets(
    options: EvaluateOptions, device: torch.device, on_step: Callable[[int, int], None] | None = None
) -> list[Callable[[], SampleSet]]:
    """Functions that open the image sets to evaluate, one after the other: a network is loaded when it is needed.

    Args:
        options: samples, and sampler, steps, labels, autoencoder and precision.
        device: for network and autoencoder.
        on_step: called with (sampling steps done, steps in all) of the current batch.

    Raises (also the functions):
        FileNotFoundError, ValueError: when there are none, they are damaged, or the options do not fit them.
    """
    if not isinstance(options.samples, str) or not is_model(Path(options.samples)):
        samples = _existing_images(options)
        return [lambda: samples]
    dtype = getattr(torch, options.dtype)
    if options.quantize:
        check_quantization(options.quantize, device, dtype)
    candidates = find_candidates(Path(options.samples), options.ema, every=options.every_checkpoint)
    models: dict[Candidate, Model] = {}

    def open_samples(candidate: Candidate, scale: float) -> SampleSet:
        if candidate not in models:
            models.clear()                                                      # one network in memory
            model = open_model(
                candidate.folder, ema=candidate.ema, autoencoder=options.autoencoder, device=device, lora=options.lora)
            model.prepare(device, dtype, compiled=False, images=options.batch_size, quantized=options.quantize)
            for each in options.guidance:                                       # before the first is sampled
                if each != 1 and not model.num_classes:
                    raise ValueError(f"{candidate.path} is unconditional: guidance needs classes, leave it out")
                model.network.architecture.check_guidance(each)
            models[candidate] = model
        name = f"guidance {scale:g}" if len(options.guidance) > 1 else candidate.name
        runs = _sampled(models[candidate], candidate, options, scale, on_step)
        architecture = models[candidate].network.architecture.to_dict()
        return SampleSet(name, runs, candidate.step, candidate.ema, scale, architecture)

    return [functools.partial(open_samples, candidate, scale) for candidate in candidates for scale in options.guidance]


def _sampled(
    model: Model, candidate: Candidate, options: EvaluateOptions, guidance: float,
    on_step: Callable[[int, int], None] | None,
) -> list[Images]:
    """Images of each range of seeds, sampled when they are read."""
    config, decoder, classes = model.network.architecture, model.decoder, range(model.num_classes)
    sampler = options.sampler or samplers_for(config.objective)[0]
    evaluations = len(make_scheduler(sampler, config.objective, options.steps).timesteps)
    cache = cache_config(options.cache, options.cache_order)
    if cache is not None:
        cache.check_run(evaluations)
    metadata = {
        "name": f"{candidate.path}", "step": candidate.step, "ema": candidate.ema, "weights_sha256": model.sha256,
        "objective": config.objective, "sampler": sampler, "evaluations": evaluations, "dtype": options.dtype,
        **({"cache": asdict(cache)} if cache else {}),
        **({"quantized": options.quantize} if options.quantize else {}),
        **({"lora_sha256": model.lora.sha256} if model.lora else {}),
        "labels": options.labels if classes else "none",
        "autoencoder_sha256": decoder.autoencoder.sha256 if decoder else None, "guidance": guidance,
    }
    generator = ImageGenerator(
        model.network, sampler=sampler, num_steps=options.steps, guidance=guidance, batch_size=options.batch_size,
        decode=model.decode, labels=classes, cache=cache,
    )

    def make(seeds: range, labels: Sequence[int] | None) -> np.ndarray:
        return generator(labels, seeds, on_step=on_step)

    (height, width), count = model.fit(None, None)[1], options.num_images or NUM_IMAGES
    runs: list[Images] = []
    for first in range(options.seed, options.seed + count * options.repeats, count):
        seeds = range(first, first + count)
        labels = [label_of(options.labels, k, seed, classes) for k, seed in enumerate(seeds)] if classes else None
        shape = (height, width, model.image_channels)
        runs.append(GeneratedImages(make, seeds, labels, metadata=metadata, shape=shape))
    return runs


def _existing_images(options: EvaluateOptions) -> SampleSet:
    """Images that are no model's; options that only a model has are refused."""
    samples = options.samples
    is_name = isinstance(samples, str)
    name = samples if is_name else "the array"
    if is_name and samples != "digits" and not Path(samples).exists():
        raise FileNotFoundError(
            f"{samples} does not exist; give a folder of images, an npz file, a run, a model, or \"shipped\""
        )
    if given := [name for name in OF_MODELS if getattr(options, name) != getattr(EvaluateOptions, name)]:
        raise ValueError(f"{name} holds images, not a model: {', '.join(given)} cannot change them")
    size, reference = None, options.reference
    if is_name and samples == "digits" and is_statistics(reference):
        size = (load_statistics(reference).image_shape or (size,))[0]
    images = open_images(samples, size, options.num_images)
    return SampleSet((Path(samples).stem or samples) if is_name else "array", [images])
