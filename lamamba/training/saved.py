"""Which network to sample from, wherever it lies: a run, a checkpoint, a saved model, a diffusers pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from lamamba.data.autoencoder import pixels_per_latent
from lamamba.data.codec import CodecFacts
from lamamba.data.labels import as_names, short_names
from lamamba.files import read_json
from lamamba.models.unet import LaMambaUNet
from lamamba.training.state import MANIFEST, RunFolder, SamplingFacts, check_manifest

PIPELINE_INDEX = "model_index.json"


def load_network(folder: Path) -> LaMambaUNet:
    """A network saved by `save_pretrained`, with one clear error for whatever is wrong with it.

    Raises:
        FileNotFoundError: when the folder holds no network.
        ValueError: when its files are damaged or do not fit together.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no network: there is no config.json in it")
    read_json(folder / "config.json")
    try:
        return LaMambaUNet.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"the weights in {folder} are missing or damaged: {str(error).splitlines()[0]}") from error


Average = float | Literal["none"]
"""Which weights of a checkpoint: those averaged with this decay, or those that were trained."""


def find_network(path: str | Path, ema: Average | None = None) -> tuple[LaMambaUNet, SamplingFacts]:
    """The network to sample from: of a run (the newest checkpoint's EMA weights), a checkpoint, a saved model, or
    a diffusers pipeline as LaMambaPipeline saves it.

    Args:
        path: the folder.
        ema: which of the averages of a run or checkpoint, by its decay, or "none"; by default the first.

    Raises:
        FileNotFoundError: when there is nothing of the kind at that place.
        ValueError: when it is damaged, or has no such average.
    """
    path = find_place(path)
    if (path / PIPELINE_INDEX).is_file():
        if ema is not None:
            raise ValueError(f"{path} is a pipeline and has one set of weights: no average can be chosen")
        return _find_in_pipeline(path)
    network = _find_average(path, ema)
    model = load_network(network)
    facts_file = path / "sampling.json"
    if not facts_file.is_file():
        raise FileNotFoundError(f"{path} has no sampling.json, so the kind of images it makes is unknown")
    return model, SamplingFacts.load(facts_file)


def find_place(path: str | Path) -> Path:
    """The folder to load from: a run's newest checkpoint, or the path itself; its hashes are checked where it has any.

    Raises:
        FileNotFoundError: when there is nothing, or a run has no checkpoint yet.
        ValueError: when it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder, a checkpoint or a saved model")
    if (path / "checkpoints").is_dir():
        newest = RunFolder(path).newest()
        if newest is None:
            raise FileNotFoundError(f"{path} is a run without a checkpoint yet; train it further")
        return newest
    if (path / MANIFEST).is_file():
        check_manifest(path)
    return path


def averages_at(place: Path) -> dict[Average, Path]:
    """What a checkpoint keeps: its averages by their decays, the first one first, then the trained weights, "none".

    Empty for a saved model, which has one set of weights.
    """
    if not (place / "state.json").is_file():
        return {}
    decays = read_json(place / "state.json").get("ema_decays", [])
    kept: dict[Average, Path] = {
        decay: place / (f"ema_{decay:g}" if number else "ema") for number, decay in enumerate(decays)
    }
    return {decay: folder for decay, folder in {**kept, "none": place / "model"}.items() if folder.is_dir()}


def _find_average(place: Path, ema: Average | None) -> Path:
    if ema is None:
        return place / "ema" if (place / "ema").is_dir() else place
    kept = averages_at(place)
    if not kept:
        raise ValueError(f"{place} is no checkpoint and has one set of weights: no average can be chosen")
    if ema not in kept:
        raise ValueError(f"{place} has no average {ema}; it has {', '.join(str(each) for each in kept)}")
    return kept[ema]


def _find_in_pipeline(path: Path) -> tuple[LaMambaUNet, SamplingFacts]:
    """The network of a diffusers pipeline, and what its files say about the images."""
    index = read_json(path / PIPELINE_INDEX)
    unet = index.get("unet")
    if not isinstance(unet, list) or unet[-1] != "LaMambaUNet":
        raise ValueError(
            f"{path} is a diffusers pipeline of another kind ({index.get('_class_name')}): it has no LaMambaUNet"
        )
    model = load_network(path / "unet")
    config = model.architecture
    facts, pixels = CodecFacts(), 1
    if (index.get("vae") or [None])[0] is not None:
        values = read_json(path / "vae" / "config.json")
        pixels, facts = pixels_per_latent(values), CodecFacts.of_config(values)
        if codec := index.get("codec"):
            plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in codec.items()}
            facts = CodecFacts(codec="latents", **plain)
        facts = dataclasses.replace(facts, autoencoder=str(path / "vae"))
    return model, SamplingFacts(
        **dataclasses.asdict(facts), objective=config.objective, image_size=config.input_size[0] * pixels,
        label_names=short_names(as_names(index.get("id2label"), config.num_classes)),
    )
