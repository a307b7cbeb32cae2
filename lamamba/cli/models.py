"""From the name of a model to all that sampling needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lamamba.data.codec import LatentDecoder
from lamamba.generation.settings import fingerprint
from lamamba.models.compiling import compile_network
from lamamba.models.packing import pack_weights
from lamamba.models.unet import LaMambaUNet
from lamamba.training.saved import Average, find_network
from lamamba.training.state import SamplingFacts

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
    facts: SamplingFacts
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


def open_network(path: Path, ema: Average | None = None) -> tuple[LaMambaUNet, SamplingFacts]:
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
