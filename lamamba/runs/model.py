"""Which network to sample from, wherever it lies: a run, a checkpoint, a saved model, a diffusers pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from lamamba.data.autoencoder import pixels_per_latent
from lamamba.data.codec import CodecConfig, LatentDecoder
from lamamba.data.labels import as_names, short_names
from lamamba.inference.compiling import compile_network
from lamamba.inference.packing import pack_weights
from lamamba.models.unet import LaMambaUNet
from lamamba.runs.folder import MANIFEST, RunFolder, check_manifest
from lamamba.runs.metadata import ModelMetadata
from lamamba.utils.files import read_json

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


def find_network(path: str | Path, ema: Average | None = None) -> tuple[LaMambaUNet, ModelMetadata]:
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
    return model, ModelMetadata.load(facts_file)


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


def _find_in_pipeline(path: Path) -> tuple[LaMambaUNet, ModelMetadata]:
    """The network of a diffusers pipeline, and what its files say about the images."""
    index = read_json(path / PIPELINE_INDEX)
    unet = index.get("unet")
    if not isinstance(unet, list) or unet[-1] != "LaMambaUNet":
        raise ValueError(
            f"{path} is a diffusers pipeline of another kind ({index.get('_class_name')}): it has no LaMambaUNet"
        )
    model = load_network(path / "unet")
    config = model.architecture
    facts, pixels = CodecConfig(), 1
    if (index.get("vae") or [None])[0] is not None:
        values = read_json(path / "vae" / "config.json")
        pixels, facts = pixels_per_latent(values), CodecConfig.of_config(values)
        if codec := index.get("codec"):
            plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in codec.items()}
            facts = CodecConfig(codec="latents", **plain)
        facts = dataclasses.replace(facts, autoencoder=str(path / "vae"))
    return model, ModelMetadata(
        **dataclasses.asdict(facts), objective=config.objective, image_size=config.input_size[0] * pixels,
        label_names=short_names(as_names(index.get("id2label"), config.num_classes)),
        guidance=index.get("guidance_scale"),
    )


def fingerprint(model: LaMambaUNet) -> str:
    """SHA-256 of a network's architecture and weights, the same however and in whatever pieces they are stored."""
    digest = hashlib.sha256(json.dumps(model.architecture.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


SHIPPED = "shipped"
"""How settings name the model that comes with the package."""


def find_shipped() -> Path:
    """The folder of the digits model that comes with the package.

    Raises:
        FileNotFoundError: where it is missing.
    """
    try:
        from lamamba.pretrained import shipped_model
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "no MODEL was given, and the small one that ships with the package is missing here; give a run folder, a "
            "checkpoint or a saved model"
        ) from error
    folder = Path(shipped_model())
    if not folder.is_dir():
        raise FileNotFoundError(f"the model that ships with the package is missing ({folder}); install it anew")
    return folder


def move(network: LaMambaUNet, device: torch.device, dtype: torch.dtype) -> LaMambaUNet:
    """A network where it works, in its precision."""
    return nn.Module.to(network, device, dtype)                                 # diffusers' own warns of nothing


@dataclass
class OpenModel:
    """A network on its device, with what its pictures need."""

    name: str
    """As settings say it."""
    network: LaMambaUNet
    facts: ModelMetadata
    sha256: str
    decoder: LatentDecoder | None
    """None for models of pixels."""

    @property
    def factor(self) -> int:
        """Pixels of a picture to one side of one of the network's inputs."""
        return max(1, self.facts.image_size // self.network.architecture.input_size[0]) if self.decoder else 1

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return self.network.architecture.num_classes

    def name_of(self, label: int) -> str:
        return self.facts.label_names[label] if self.facts.label_names else str(label)

    def fit(self, height: int | None, width: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """The sizes of the network's input and of the picture, (height, width) each.

        Raises:
            ValueError: when a side does not fit, naming the nearest that do.
        """
        size = self.network.architecture.fit_input(height, width, self.factor)
        return size, (size[0] * self.factor, size[1] * self.factor)

    def prepare(self, device: torch.device, dtype: torch.dtype, compiled: bool, images: int) -> None:
        """Move the network to where it works, in its precision, made fast for batches of so many images."""
        move(self.network, device, dtype)
        if dtype == torch.bfloat16 and device.type == "cpu" and not compiled:
            grid = self.network.architecture.token_grid
            pack_weights(self.network, grid[0] * grid[1] * images)
        if compiled:
            compile_network(self.network)


def open_network(path: Path, ema: Average | None = None) -> tuple[LaMambaUNet, ModelMetadata]:
    """A network and the facts that go with it.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, or a pickle.
    """
    if path.is_file():
        raise ValueError(
            f"{path} is a file, and a model is a folder; a pickled checkpoint can run code, so it is not opened here: "
            f"lamamba convert {path} DIR makes a folder of an official one"
        )
    return find_network(path, ema)


def open_model(
    path: Path | None, autoencoder: str | None, device: torch.device, ema: Average | None = None
) -> OpenModel:
    """Read a model: a run folder's newest averaged weights, a checkpoint, or a saved model; the shipped one for None.

    Args:
        path: the folder.
        autoencoder: decodes latents; by default the one that made those the model was trained on.
        ema: which of a checkpoint's averages; by default the first.
        device: where the autoencoder works. The network stays on the CPU until `OpenModel.prepare`.

    Raises:
        FileNotFoundError: when there is no model.
        ValueError: when it is damaged, a pickle, or the autoencoder does not fit.
    """
    network, facts = open_network(path or find_shipped(), ema)
    decoder = None
    if facts.codec == "latents":
        name = autoencoder or facts.autoencoder
        if name is None:
            raise ValueError("this model makes latents: name the autoencoder that decodes them with --autoencoder")
        decoder = LatentDecoder(name, facts, device)
    elif autoencoder is not None:
        raise ValueError("this model makes pixels: leave --autoencoder out")
    return OpenModel(SHIPPED if path is None else str(path), network, facts, fingerprint(network), decoder)
