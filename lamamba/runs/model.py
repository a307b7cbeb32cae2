"""The one opener of models: a run, a checkpoint, a saved model, an exported pipeline, or the one in the package."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lamamba.data.autoencoder import Autoencoder, pixels_per_latent
from lamamba.data.codec import CodecConfig, Decode, LatentDecoder, to_uint8
from lamamba.data.labels import as_names, short_names
from lamamba.inference.compiling import compile_network
from lamamba.inference.packing import PACKED_DTYPES, pack_weights
from lamamba.inference.quantizing import quantize
from lamamba.models.adapters import check_peft
from lamamba.models.unet import LaMambaUNet
from lamamba.models.weights import check_weights, read_config
from lamamba.options.base import Quantization, from_dict
from lamamba.pretrained import is_shipped, shipped_model
from lamamba.runs.folder import MANIFEST, CheckpointState, RunFolder, check_manifest
from lamamba.runs.lora import Lora, LoraBase, add_lora, is_lora
from lamamba.runs.metadata import ModelMetadata, assumed_metadata
from lamamba.utils.files import read_json
from lamamba.utils.tensors import check_finite, read_tensors, weight_files

logger = logging.getLogger("lamamba.runs")

PIPELINE_INDEX = "model_index.json"
METADATA = "sampling.json"
SHIPPED = "shipped"
"""Name of the model in the package that is opened where none is named."""
FEW_STEPS = "shipped-few-steps"
"""The flow map of the package."""
EMA = float | Literal["none"]
"""Which weights of a checkpoint: the average with this decay, or the trained ones."""


def open_model(
    path: str | Path | None = None, *, ema: EMA | None = None, autoencoder: str | None = None,
    device: torch.device | str = "cpu", lora: str | Path | None = None,
) -> Model:
    """Open a trained model to sample from it.

        model = lamamba.open_model("runs/digits")
        output = model.network(x, timestep, class_labels)

    Args:
        path: a run folder (its newest checkpoint), a checkpoint, a folder of `save_pretrained`, an exported pipeline;
            None or "shipped" for the digits model of the package, "shipped-few-steps" for its flow map.
        ema: which average of a run or checkpoint, by its decay, or "none"; by default the first.
        autoencoder: folder or hub id, for models of latents; by default the one of the training.
        device: of the autoencoder. The network stays on the CPU until `Model.prepare`.
        lora: a LoRA of this network, a run or a folder: it is added to the weights.

    Raises:
        FileNotFoundError: when there is no model.
        ValueError: when it is damaged or a pickle, has no such average, or does not fit the autoencoder; when the LoRA
            is one of another network.
        RuntimeError: without peft, where there is a LoRA.
    """
    place = None if lora is None else lora_folder(lora)
    network, saved = _open(path, ema)
    metadata, decoder = saved or assumed_metadata(network.architecture), None
    if metadata.codec == "latents" or (saved is None and autoencoder is not None):
        name = autoencoder or metadata.autoencoder
        if name is None:
            _log_assumption(path, saved, metadata)
            raise ValueError("this model makes latents: name the autoencoder that decodes them (option autoencoder)")
        loaded = Autoencoder(name, device)
        if saved is None:
            image_size = network.architecture.input_size[0] * pixels_per_latent(loaded.config)
            codec = dataclasses.asdict(CodecConfig.of(loaded))
            metadata = dataclasses.replace(metadata, **codec, image_size=image_size)
        decoder = LatentDecoder(loaded, metadata)
    elif autoencoder is not None:
        raise ValueError("this model makes pixels: leave autoencoder out")
    _log_assumption(path, saved, metadata)
    sha256 = fingerprint(network)
    added = None if place is None else add_lora(network, sha256, place, str(lora))
    return Model(SHIPPED if path is None else str(path), network, metadata, sha256, decoder, added)


def open_network(path: str | Path | None, ema: EMA | None = None) -> tuple[LaMambaUNet, ModelMetadata]:
    """The network of `open_model` and its metadata, without an autoencoder and without a hash of the weights.

    Raises:
        FileNotFoundError, ValueError: as `open_model`.
    """
    network, saved = _open(path, ema)
    metadata = saved or assumed_metadata(network.architecture)
    _log_assumption(path, saved, metadata)
    return network, metadata


def _open(path: str | Path | None, ema: EMA | None) -> tuple[LaMambaUNet, ModelMetadata | None]:
    """A network and its metadata; None for these where Python's save_pretrained wrote the folder."""
    folder = model_folder(path)
    if (folder / PIPELINE_INDEX).is_file():
        if ema is not None:
            raise ValueError(f"{folder} is a pipeline and has one set of weights: no average can be chosen")
        return _open_pipeline(folder)
    network = load_network(_average_folder(folder, ema))
    if (folder / METADATA).is_file():
        metadata = ModelMetadata.load(folder / METADATA)
        metadata.check_fits(network.architecture, folder / METADATA)
        return network, metadata
    if (folder / "state.json").is_file() or (folder / "ema").is_dir():
        raise FileNotFoundError(f"{folder} has no {METADATA}, so the kind of images it makes is unknown")
    return network, None


def _log_assumption(path: str | Path | None, saved: ModelMetadata | None, metadata: ModelMetadata) -> None:
    if saved is None:
        of_latents = f"latents of {metadata.autoencoder or 'Stable Diffusion'}, scale {metadata.scale:g}"
        what = of_latents if metadata.codec == "latents" else "pixels"
        logger.info("%s has no %s: taken for a model of %s, without names of classes", path, METADATA, what)


def model_folder(path: str | Path | None) -> Path:
    """The folder that holds a model: a run's newest checkpoint, or the path itself; hashes are checked if it has any.

    Raises:
        FileNotFoundError: when there is nothing, or a run has no checkpoint yet.
        ValueError: when it is damaged, or a pickle.
    """
    if path is None or is_shipped(path):
        return shipped_model(SHIPPED if path is None else str(path))
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder, a checkpoint or a saved model")
    if path.is_file():
        raise ValueError(
            f"{path} is a file, and a model is a folder; a pickled checkpoint can run code, so it is not opened here: "
            f"lamamba convert {path} DIR makes a folder of an official one"
        )
    if (path / "checkpoints").is_dir():
        newest = RunFolder(path).newest()
        if newest is None:
            raise FileNotFoundError(f"{path} is a run without a checkpoint yet; train it further")
        return newest
    if (path / MANIFEST).is_file():
        check_manifest(path)
    return path


def lora_folder(path: str | Path) -> Path:
    """The folder that holds a LoRA: of a run or checkpoint the averaged one, or the path itself.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged.
        RuntimeError: without peft.
    """
    check_peft()
    if Path(path).suffix == ".safetensors" and Path(path).is_file():
        raise ValueError(f"{path} is a file, and a LoRA is a folder: give {Path(path).parent}")
    folder = model_folder(path)
    folder = folder / "ema" if (folder / "ema").is_dir() else folder
    if not is_lora(folder):
        raise FileNotFoundError(f"{path} holds no LoRA; lamamba train --lora.rank 16 --start.source MODEL makes one")
    return folder


def base_of_lora(path: str | Path) -> Path | None:
    """The network that a LoRA is for, where it says so and the network is where it was.

    Raises: as `lora_folder`.
    """
    base = LoraBase.load(lora_folder(path))
    return Path(base.base) if base is not None and (is_shipped(base.base) or Path(base.base).exists()) else None


def average_folders(checkpoint: Path, decays: Iterable[float]) -> dict[float, Path]:
    """Folders of averaged networks in a checkpoint, by their decay; the first one's is "ema"."""
    return {decay: checkpoint / (f"ema_{decay:g}" if number else "ema") for number, decay in enumerate(decays)}


def list_averages(checkpoint: Path) -> dict[EMA, Path]:
    """The weights in a checkpoint: averages by their decays, the first one first, then the trained weights, "none".

    Empty for a saved model, which has one set of weights.
    """
    if not (checkpoint / "state.json").is_file():
        return {}
    decays = CheckpointState.load(checkpoint).ema_decays or ()
    kept: list[tuple[EMA, Path]] = [*average_folders(checkpoint, decays).items(), ("none", checkpoint / "model")]
    return {decay: folder for decay, folder in kept if folder.is_dir()}


def _average_folder(folder: Path, ema: EMA | None) -> Path:
    if ema is None:
        return folder / "ema" if (folder / "ema").is_dir() else folder
    kept = list_averages(folder)
    if not kept:
        raise ValueError(f"{folder} is no checkpoint and has one set of weights: no average can be chosen")
    if ema not in kept:
        raise ValueError(f"{folder} has no average {ema}; it has {', '.join(str(each) for each in kept)}")
    return kept[ema]


def load_network(folder: Path) -> LaMambaUNet:
    """A network from a folder of its `save_pretrained`, in evaluation mode, its weights read into memory.

    Raises:
        OSError: when the folder holds no network, or a file may not be read.
        ValueError: when its files are damaged or do not fit together, or a weight is not finite; for a LoRA.
    """
    if is_lora(folder):
        base = LoraBase.load(folder)
        named = "the network that it was trained for" if base is None else base.base
        raise ValueError(f"{folder} holds a LoRA and no network: give {named} as the model, and this as lora")
    if not (folder / "config.json").is_file():
        inside = sorted({path.parent for kind in ("config.json", "checkpoints") for path in folder.glob(f"*/{kind}")})
        others = f"; give {' or '.join(map(str, inside))}" if inside else ""
        raise FileNotFoundError(f"{folder} holds no network: there is no config.json in it{others}")
    config, files = read_config(folder), weight_files(folder)
    network = check_weights(LaMambaUNet, config, files, folder)
    weights = {name: w.to(torch.float32, copy=True) for file in files for name, w in read_tensors(file).items()}
    network.load_state_dict(weights, assign=True)
    network.set_grid(None)                                                      # its tables are on meta
    check_finite(network, folder)
    return network.eval()


def _open_pipeline(folder: Path) -> tuple[LaMambaUNet, ModelMetadata]:
    """The network of a diffusers pipeline, and what its files say about the images."""
    path = folder / PIPELINE_INDEX
    index = read_json(path)
    unet = index.get("unet")
    if not isinstance(unet, list) or unet[-1:] != ["LaMambaUNet"]:
        raise ValueError(
            f"{folder} is a diffusers pipeline of another kind ({index.get('_class_name')}): it has no LaMambaUNet"
        )
    network = load_network(folder / "unet")
    config = network.architecture
    codec, pixels = CodecConfig(), 1
    try:
        if index.get("vae") not in (None, [None, None]):
            path = folder / "vae" / "config.json"
            values = read_json(path)
            pixels, codec = pixels_per_latent(values), CodecConfig.of_config(values)
            path = folder / PIPELINE_INDEX
            if saved := index.get("codec"):
                codec = from_dict(CodecConfig, {"codec": "latents", **saved} if isinstance(saved, dict) else saved)
            codec = dataclasses.replace(codec, autoencoder=str(folder / "vae"))
        metadata = from_dict(ModelMetadata, {
            **dataclasses.asdict(codec), "objective": config.objective, "image_size": config.input_size[0] * pixels,
            "label_names": short_names(as_names(index.get("id2label"), config.num_classes)),
            "guidance": index.get("guidance_scale"),
        })
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    metadata.check_fits(config, path)
    return network, metadata


def fingerprint(model: LaMambaUNet) -> str:
    """SHA-256 of a network's architecture and weights, the same however and in whatever pieces they are stored."""
    digest = hashlib.sha256(json.dumps(model.architecture.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def move(network: LaMambaUNet, device: torch.device, dtype: torch.dtype) -> LaMambaUNet:
    """A network moved to a device and dtype."""
    return nn.Module.to(network, device, dtype)                                 # diffusers' own warns of nothing


@dataclass
class Model:
    """A trained network with what sampling needs besides."""

    name: str
    """The path that was opened, or "shipped"."""
    network: LaMambaUNet = field(repr=False)
    metadata: ModelMetadata
    sha256: str
    """Of architecture and weights, by `fingerprint`."""
    decoder: LatentDecoder | None
    """None for models of pixels."""
    lora: Lora | None = None
    """Which the weights hold besides what the hash is of."""

    @property
    def factor(self) -> int:
        """Side in image pixels of one pixel of the network's input."""
        return max(1, self.metadata.image_size // self.network.architecture.input_size[0]) if self.decoder else 1

    @property
    def decode(self) -> Decode:
        """x0 to images."""
        return self.decoder.decode if self.decoder else to_uint8

    @property
    def image_channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.decoder.autoencoder.out_channels if self.decoder else self.network.architecture.in_channels

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return self.network.architecture.num_classes

    def name_of(self, label: int) -> str:
        return self.metadata.label_names[label] if self.metadata.label_names else str(label)

    def fit(self, height: int | None, width: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """The sizes of the network's input and of the image, (height, width) each.

        Raises:
            ValueError: when a side does not fit, naming the nearest that do.
        """
        size = self.network.architecture.fit_input(height, width, self.factor)
        return size, (size[0] * self.factor, size[1] * self.factor)

    def prepare(
        self, device: torch.device, dtype: torch.dtype, compiled: bool, images: int,
        quantized: Quantization | None = None,
    ) -> None:
        """Move the network to a device and dtype, and quantise, pack or compile it for batches of so many images.

        Raises:
            RuntimeError: without torchao, where it is to be quantised, or without a compiler.
        """
        move(self.network, device, dtype)
        if quantized:
            quantize(self.network, quantized, compiled=compiled)
        if dtype in PACKED_DTYPES and device.type == "cpu" and not compiled:
            grid = self.network.architecture.token_grid
            pack_weights(self.network, grid[0] * grid[1] * images)
        if compiled:
            compile_network(self.network)
