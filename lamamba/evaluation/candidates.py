"""Image sets to evaluate: existing ones, and those that networks sample while they are evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamamba.data.digits import SIDE
from lamamba.diffusion.denoise import make_scheduler, samplers_for
from lamamba.evaluation.images import ArrayImages, DigitImages, FolderImages, GeneratedImages, Images, NpzImages
from lamamba.evaluation.reference import is_statistics, load_statistics
from lamamba.options.evaluation import EvaluateOptions
from lamamba.pretrained import shipped_model
from lamamba.runs.folder import CheckpointState, RunFolder
from lamamba.runs.model import EMA, PIPELINE_INDEX, SHIPPED, list_averages, open_model
from lamamba.sampling.generate import ImageGenerator
from lamamba.sampling.labels import label_of
from lamamba.sampling.plan import NPZ, SHARDS, UNFINISHED, find_plan
from lamamba.utils.text import counted

NUM_IMAGES = 50_000
"""Samples behind a published FID."""


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
        if (folder / UNFINISHED).is_dir():
            raise ValueError(f"lamamba sample has not filled {folder} yet; run it again, it goes on where it was")
        is_npz = name.endswith(".npz")
        made = NpzImages(name, limit=limit) if is_npz else FolderImages(name, limit, image_size, channels)
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


def is_shipped(path: Path) -> bool:
    """Whether the path names the model of the package, and not a folder called so."""
    return str(path) == SHIPPED and not path.exists()


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
        folders = [shipped_model() if is_shipped(path) else path]
    found = []
    for folder in folders:
        kept = list_averages(folder)
        if not kept:
            if ema is not None:
                raise ValueError(f"{folder} is a single network; ema chooses among a checkpoint's averages")
            found.append(Candidate(path.name or str(path), path, folder))
            continue
        if ema is not None and ema not in kept:
            raise ValueError(f"{folder} has no average {ema}; it has {', '.join(str(each) for each in kept)}")
        step, averages = CheckpointState.load(folder).step, [each for each in kept if each != "none"]
        for average in [ema] if ema is not None else averages if every else averages[:1]:
            name = f"{step}" + (f" ema {average}" if every and len(averages) > 1 else "")
            found.append(Candidate(name, path, folder, step, average))
    return found


class Sampler:
    """A network prepared for sampling.

    Args:
        candidate: which weights.
        options: sampler, steps, labels, autoencoder and precision.
        device: for network and autoencoder.
        on_step: called with (sampling steps done, steps in all) of the current batch.

    Raises:
        FileNotFoundError, ValueError: when it is damaged, or the options do not fit it.
    """

    def __init__(
        self, candidate: Candidate, options: EvaluateOptions, device: torch.device,
        on_step: Callable[[int, int], None] | None = None,
    ):
        self._model = open_model(
            candidate.folder, ema=candidate.ema, autoencoder=options.autoencoder, device=device
        )
        self._options, self._on_step = options, on_step
        config = self._model.network.architecture
        self.architecture = config.to_dict()
        self._sampler = options.sampler or samplers_for(config.objective)[0]
        steps = len(make_scheduler(self._sampler, config.objective, options.steps).timesteps)
        decoder = self._model.decoder
        height, width = self._model.fit(None, None)[1]
        self._shape = (height, width, 3 if decoder else config.in_channels)
        self._metadata: dict[str, Any] = {
            "name": f"{candidate.path}", "step": candidate.step, "ema": candidate.ema,
            "weights_sha256": self._model.sha256, "objective": config.objective, "sampler": self._sampler,
            "evaluations": steps, "dtype": options.dtype,
            "labels": options.labels if config.num_classes else "none",
            "autoencoder_sha256": decoder.autoencoder.sha256 if decoder else None,
        }
        self._model.prepare(device, getattr(torch, options.dtype), compiled=False, images=options.batch_size)

        self._generator: tuple[float, ImageGenerator] | None = None

    def _generator_at(self, guidance: float) -> ImageGenerator:
        """One for all batches at a guidance scale; that of another scale is dropped."""
        if self._generator is None or self._generator[0] != guidance:
            self._generator = guidance, ImageGenerator(
                self._model.network, sampler=self._sampler, num_steps=self._options.steps, guidance=guidance,
                batch_size=self._options.batch_size, decoder=self._model.decoder, labels=range(self._model.num_classes),
            )
        return self._generator[1]

    def images(self, count: int, first_seed: int, guidance: float) -> GeneratedImages:
        """Images of consecutive seeds, sampled when they are read."""
        classes = range(self._model.num_classes)
        if guidance != 1 and not classes:
            raise ValueError(f"{self._metadata['name']} is unconditional: guidance needs classes, leave it out")
        seeds = range(first_seed, first_seed + count)

        def make(seeds: range, labels: Sequence[int] | None) -> np.ndarray:
            return self._generator_at(guidance)(labels, seeds, on_step=self._on_step)

        labels = [label_of(self._options.labels, k, seed, classes) for k, seed in enumerate(seeds)] if classes else None
        metadata = {**self._metadata, "guidance": guidance}
        return GeneratedImages(make, seeds, labels, metadata=metadata, shape=self._shape)


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

    Args: as `Sampler`.

    Raises:
        FileNotFoundError, ValueError: when there are none, or the options do not fit them.
    """
    if not isinstance(options.samples, str) or not is_model(Path(options.samples)):
        samples = _existing_images(options)
        return [lambda: samples]
    count = NUM_IMAGES if options.num_images is None else options.num_images
    candidates = find_candidates(Path(options.samples), options.ema, every=options.every_checkpoint)
    samplers: dict[Candidate, Sampler] = {}

    def open_samples(candidate: Candidate, scale: float) -> SampleSet:
        if candidate not in samplers:
            samplers.clear()                                                    # one network in memory
            samplers[candidate] = Sampler(candidate, options, device, on_step)
        seeds = [options.seed + count * repeat for repeat in range(options.repeats)]
        runs: list[Images] = [samplers[candidate].images(count, seed, scale) for seed in seeds]
        name = f"guidance {scale:g}" if len(options.guidance) > 1 else candidate.name
        architecture = samplers[candidate].architecture
        return SampleSet(name, runs, candidate.step, candidate.ema, scale, architecture)

    return [functools.partial(open_samples, candidate, scale) for candidate in candidates for scale in options.guidance]


def _existing_images(options: EvaluateOptions) -> SampleSet:
    """Images that are no model's; options that only a model has are refused."""
    samples = options.samples
    is_name = isinstance(samples, str)
    name = samples if is_name else "the array"
    if is_name and samples != "digits" and not Path(samples).exists():
        raise FileNotFoundError(
            f"{samples} does not exist; give a folder of images, an npz file, a run, a model, or \"shipped\""
        )
    defaults = {
        "repeats": 1, "every_checkpoint": False, "ema": None, "guidance": (1.0,), "seed": 0, "sampler": None,
        "steps": None, "autoencoder": None,
    }
    given = [key for key, value in defaults.items() if getattr(options, key) != value]
    if given:
        raise ValueError(f"{name} holds images, not a model: {', '.join(given)} cannot change them")
    size, reference = None, options.reference
    if is_name and samples == "digits" and is_statistics(reference):
        size = (load_statistics(reference).image_shape or (size,))[0]
    images = open_images(samples, size, options.num_images)
    return SampleSet((Path(samples).stem or samples) if is_name else "array", [images])
