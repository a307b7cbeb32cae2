"""What `lamamba evaluate` looks at: images that are there, and networks that make some while they are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamamba.cli.sample_options import SampleOptions
from lamamba.data.codec import LatentDecoder
from lamamba.diffusion.denoise import make_scheduler, samplers_for
from lamamba.evaluation.features import hash_weights
from lamamba.evaluation.images import DigitImages, FolderImages, GeneratedImages, Images, NpzImages
from lamamba.generation import generate
from lamamba.models.packing import pack_weights
from lamamba.models.unet import LaMambaUNet
from lamamba.training.state import MANIFEST, RunFolder, SamplingFacts, check_manifest, load_network, read_json


def open_images(name: str, image_size: int = 8, limit: int | None = None) -> Images:
    """Images by name: "digits", an npz file, or a folder.

    Raises:
        FileNotFoundError, ValueError: when there are none.
    """
    if name == "digits":
        return DigitImages(image_size, limit)
    return NpzImages(name, limit=limit) if name.endswith(".npz") else FolderImages(name, limit)


def is_model(path: Path) -> bool:
    """Whether a folder is a run, a checkpoint or a saved network."""
    return (path / "checkpoints").is_dir() or (path / MANIFEST).is_file() or (path / "sampling.json").is_file()


@dataclass(frozen=True)
class Candidate:
    """One set of weights."""

    name: str
    path: Path
    """Run, checkpoint or model, as the user named it."""
    place: Path
    """Checkpoint or model."""
    network: Path
    step: int | None
    ema: float | str | None
    """Decay of the average; "none" for the trained weights themselves; None where nobody knows."""


def find_candidates(path: Path, ema: str | None = None, *, every: bool = False) -> list[Candidate]:
    """The networks at a place: of a run's newest checkpoint or of all, its first average or all of them.

    Args:
        ema: a decay (as 0.999), "none" for the weights that were not averaged; by default the first average, or, with
            every, each.

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
        places = [path]
    found = []
    for place in places:
        if not (place / MANIFEST).is_file():
            if ema is not None:
                raise ValueError(f"{place} is a single network; --ema chooses among a checkpoint's averages")
            network = place / "ema" if (place / "ema").is_dir() else place
            found.append(Candidate(place.name, path, place, network, None, None))
            continue
        check_manifest(place)
        state = read_json(place / "state.json")
        decays = state.get("ema_decays") or [None]
        folders: dict[str, tuple[Path, float | str | None]] = {
            "?" if decay is None else f"{decay:g}": (place / ("ema" if k == 0 else f"ema_{decay:g}"), decay)
            for k, decay in enumerate(decays)
        }
        if (place / "model").is_dir():
            folders["none"] = (place / "model", "none")
        if ema is not None and ema not in folders:
            raise ValueError(f"{place} has no average {ema!r}; it has {', '.join(folders)}")
        averages = [key for key in folders if key != "none"]
        for key in [ema] if ema is not None else averages if every else averages[:1]:
            name = f"{state['step']}" + (f" ema {key}" if every and len(averages) > 1 else "")
            found.append(Candidate(name, path, place, folders[key][0], int(state["step"]), folders[key][1]))
    return found


class Sampler:
    """A network with all that makes pictures of its output.

    Raises:
        FileNotFoundError, ValueError: when it is damaged, or the options do not fit it.
    """

    def __init__(self, candidate: Candidate, options: SampleOptions, device: torch.device, batch_size: int):
        facts_file = candidate.place / "sampling.json"
        if not facts_file.is_file():
            raise FileNotFoundError(f"{candidate.place} has no sampling.json: the kind of images it makes is unknown")
        facts = SamplingFacts.load(facts_file)
        model: LaMambaUNet = load_network(candidate.network)
        self.num_classes = model.architecture.num_classes or 0
        self.options, self._batch_size = options, batch_size
        objective = model.architecture.objective
        self.sampler = options.sampler or samplers_for(objective)[0]
        self.steps = len(make_scheduler(self.sampler, objective, options.steps).timesteps)
        weights = hash_weights(model)
        self._decoder = None
        if facts.codec == "latents":
            name = options.autoencoder or facts.autoencoder
            if name is None:
                raise ValueError("this model makes latents: name the autoencoder that decodes them with --autoencoder")
            self._decoder = LatentDecoder(name, facts, device)
            self.shape = (facts.image_size, facts.image_size, 3)
        elif options.autoencoder is not None:
            raise ValueError("this model makes pixels: leave --autoencoder out")
        else:
            self.shape = (*model.architecture.input_size, model.architecture.in_channels)
        self.facts: dict[str, Any] = {
            "name": f"{candidate.path}", "step": candidate.step, "ema": candidate.ema, "weights_sha256": weights,
            "objective": objective, "sampler": self.sampler, "evaluations": self.steps, "dtype": options.dtype,
            "autoencoder_sha256": self._decoder.autoencoder.sha256 if self._decoder else None,
        }
        self._model = model.to(device)
        if options.dtype != "float32":
            self._model = self._model.to(getattr(torch, options.dtype))
        if options.dtype == "bfloat16" and device.type == "cpu":
            tokens = model.architecture.token_grid[0] * model.architecture.token_grid[1]
            pack_weights(self._model, tokens * batch_size)

    def images(
        self, count: int, first_seed: int, guidance: float, on_step: Callable[[int, int], None] | None = None
    ) -> GeneratedImages:
        """So many images, made when they are read."""
        if guidance != 1 and not self.num_classes:
            raise ValueError(f"{self.facts['name']} is unconditional: guidance needs classes, leave --guidance out")

        def make(seeds: range, labels: list[int] | None) -> np.ndarray:
            return generate(
                self._model, labels, seeds, sampler=self.sampler, num_steps=self.options.steps, guidance=guidance,
                batch_size=self._batch_size, decoder=self._decoder, on_step=on_step,
            )

        return GeneratedImages(
            make, count, first_seed=first_seed, num_classes=self.num_classes, shape=self.shape,
            balanced=self.options.labels == "balanced", facts={**self.facts, "guidance": guidance},
        )
