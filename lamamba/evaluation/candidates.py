"""What `lamamba evaluate` looks at: images that are there, and networks that make some while they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamamba.diffusion.denoise import make_scheduler, samplers_for
from lamamba.evaluation.images import DigitImages, FolderImages, GeneratedImages, Images, NpzImages
from lamamba.options.evaluation import SampleOptions
from lamamba.runs.folder import RunFolder
from lamamba.runs.model import PIPELINE_INDEX, SHIPPED, Average, averages_at, find_shipped, open_model
from lamamba.sampling import generate
from lamamba.sampling.labels import label_of
from lamamba.sampling.plan import NPZ, SHARDS, UNFINISHED, find_plan
from lamamba.utils.files import read_json


def open_images(name: str, image_size: int = 8, limit: int | None = None) -> Images:
    """Images by name: "digits", an npz file, or a folder; at most `limit`, the first ones.

    What `lamamba sample -n` has made carries its plan (model, sampler, guidance, seeds) into the protocol.

    Raises:
        FileNotFoundError, ValueError: when there are none, fewer than `limit`, or not all of them yet.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--num-images {limit} must be at least 2")
    if name == "digits":
        images: Images = DigitImages(image_size, limit)
    else:
        folder = Path(name).parent if Path(name).name == NPZ else Path(name)
        if (folder / UNFINISHED).is_dir():
            raise ValueError(f"lamamba sample has not filled {folder} yet; run it again, it goes on where it was")
        made = NpzImages(name, limit=limit) if name.endswith(".npz") else FolderImages(name, limit)
        if (folder / SHARDS).is_file() and (plan := find_plan(folder)) is not None:
            made.facts["made_by"] = plan.to_dict()
        images = made
    if limit is not None and len(images) < limit:
        raise ValueError(f"{name} has {len(images):,} images, and --num-images {limit} asks for more; leave it out")
    return images


def is_model(path: Path) -> bool:
    """Whether a folder is a run, a checkpoint, a saved network or a pipeline; "shipped" is one, too."""
    names = ("checkpoints", "state.json", "sampling.json", PIPELINE_INDEX)
    return is_shipped(path) or any((path / name).exists() for name in names) or any(
        path.glob("diffusion_pytorch_model*")
    )


def is_shipped(path: Path) -> bool:
    """Whether the model that comes with the package is meant, and not a folder of that name."""
    return str(path) == SHIPPED and not path.exists()


@dataclass(frozen=True)
class Candidate:
    """One set of weights."""

    name: str
    path: Path
    """Run, checkpoint or model, as the user named it."""
    place: Path
    """Checkpoint or model."""
    step: int | None = None
    ema: Average | None = None
    """None where there is no choice."""


def find_candidates(path: Path, ema: Average | None = None, *, every: bool = False) -> list[Candidate]:
    """The networks at a place: of a run's newest checkpoint or of all, its first average or all of them.

    Args:
        ema: which average; by default the first, or, with every, each.

    Raises:
        FileNotFoundError, ValueError: when there is none, or not such an average.
    """
    if (path / "checkpoints").is_dir():
        run = RunFolder(path)
        names = run.names()
        if not names:
            raise FileNotFoundError(f"{path} is a run without a checkpoint yet; train it further")
        places = [run.checkpoints / name for name in (names if every else names[-1:])]
    elif every:
        raise ValueError(f"{path} is no run: --every-checkpoint scores the checkpoints of a run's folder")
    else:
        places = [find_shipped() if is_shipped(path) else path]
    found = []
    for place in places:
        kept = averages_at(place)
        if not kept:
            if ema is not None:
                raise ValueError(f"{place} is a single network; --ema chooses among a checkpoint's averages")
            found.append(Candidate(path.name or str(path), path, place))
            continue
        if ema is not None and ema not in kept:
            raise ValueError(f"{place} has no average {ema}; it has {', '.join(str(each) for each in kept)}")
        step, averages = int(read_json(place / "state.json")["step"]), [each for each in kept if each != "none"]
        for chosen in [ema] if ema is not None else averages if every else averages[:1]:
            name = f"{step}" + (f" ema {chosen}" if every and len(averages) > 1 else "")
            found.append(Candidate(name, path, place, step, chosen))
    return found


class Sampler:
    """A network with all that makes pictures of its output.

    Raises:
        FileNotFoundError, ValueError: when it is damaged, or the options do not fit it.
    """

    def __init__(self, candidate: Candidate, options: SampleOptions, device: torch.device, batch_size: int):
        self._model = open_model(candidate.place, options.autoencoder, device, candidate.ema)
        self._options, self._batch_size = options, batch_size
        config = self._model.network.architecture
        self._sampler = options.sampler or samplers_for(config.objective)[0]
        steps = len(make_scheduler(self._sampler, config.objective, options.steps).timesteps)
        decoder = self._model.decoder
        height, width = self._model.fit(None, None)[1]
        self._shape = (height, width, 3 if decoder else config.in_channels)
        self._facts: dict[str, Any] = {
            "name": f"{candidate.path}", "step": candidate.step, "ema": candidate.ema,
            "weights_sha256": self._model.sha256, "objective": config.objective, "sampler": self._sampler,
            "evaluations": steps, "dtype": options.dtype,
            "labels": options.labels if config.num_classes else "none",
            "autoencoder_sha256": decoder.autoencoder.sha256 if decoder else None,
        }
        self._model.prepare(device, getattr(torch, options.dtype), compiled=False, images=batch_size)

    def images(
        self, count: int, first_seed: int, guidance: float, on_step: Callable[[int, int], None] | None = None
    ) -> GeneratedImages:
        """So many images, made when they are read."""
        classes = range(self._model.num_classes)
        if guidance != 1 and not classes:
            raise ValueError(f"{self._facts['name']} is unconditional: guidance needs classes, leave --guidance out")
        seeds = range(first_seed, first_seed + count)

        def make(seeds: range, labels: Sequence[int] | None) -> np.ndarray:
            return generate(
                self._model.network, labels, seeds, sampler=self._sampler, num_steps=self._options.steps,
                guidance=guidance, batch_size=self._batch_size, decoder=self._model.decoder, on_step=on_step,
            )

        labels = [label_of(self._options.labels, k, seed, classes) for k, seed in enumerate(seeds)] if classes else None
        return GeneratedImages(make, seeds, labels, facts={**self._facts, "guidance": guidance}, shape=self._shape)
