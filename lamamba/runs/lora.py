"""Folders of LoRAs: the weights of an adapter, and the network that they are for.

    lora.json                             the network, by its name and by the hash of its weights
    pytorch_lora_weights.safetensors      as LaMambaUNet.save_lora_adapter writes it

A LoRA that another program has saved has no lora.json: it is taken where its tensors fit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lamamba.models.adapters import LORA_FILE, check_fits
from lamamba.models.unet import LaMambaUNet
from lamamba.options.base import read_record, record
from lamamba.utils.files import sha256, write_json
from lamamba.utils.tensors import check_finite, read_header

LORA_BASE = "lora.json"
LORA_VERSION = 1


@record
class LoraBase:
    """The network that a LoRA is for; saved as lora.json."""

    base: str
    """As it was named."""
    base_sha256: str
    """Of architecture and weights, by `lamamba.runs.model.fingerprint`."""
    lora_sha256: str | None = None
    """Of the LoRA's own file."""
    version: int = LORA_VERSION

    @classmethod
    def load(cls, folder: Path) -> LoraBase | None:
        """Of a LoRA's folder; None where another program has saved it.

        Raises:
            ValueError: when lora.json is damaged or of a newer format.
        """
        path = folder / LORA_BASE
        return read_record(cls, path, LORA_VERSION) if path.is_file() else None


@dataclass(frozen=True)
class Lora:
    """A LoRA that a network's weights hold."""

    name: str
    """As it was named."""
    sha256: str
    """Of its file."""


def is_lora(folder: Path) -> bool:
    """Whether a folder holds a LoRA."""
    return (folder / LORA_FILE).is_file()


def save_lora(network: LaMambaUNet, base: LoraBase, folder: Path) -> None:
    """Save the adapter "default" of a network in a folder, which is made."""
    network.save_lora_adapter(folder)
    base = dataclasses.replace(base, lora_sha256=sha256(folder / LORA_FILE))
    write_json(folder / LORA_BASE, dataclasses.asdict(base))


def add_lora(network: LaMambaUNet, network_sha256: str, folder: Path, name: str) -> Lora:
    """Add a LoRA to the weights of a network, W + (alpha / r) B A, in place.

    Args:
        network: without adapters.
        network_sha256: its `fingerprint`.
        folder: of the LoRA.
        name: of the LoRA, for messages and settings.

    Raises:
        ValueError: when it is a LoRA of another network, or damaged; nothing is changed, unless its products
            are too large for float32.
        RuntimeError: without peft.
    """
    base = LoraBase.load(folder)
    if base is not None and base.base_sha256 != network_sha256:
        raise ValueError(
            f"{name} is a LoRA of another network: of {base.base} with weights {base.base_sha256[:12]}, and this one's "
            f"are {network_sha256[:12]}; give that network as the model, wherever it is now"
        )
    own = sha256(folder / LORA_FILE)
    if base is not None and base.lora_sha256 not in (None, own):
        raise ValueError(f"{folder / LORA_FILE} is damaged: its hash is not the one in {LORA_BASE}; copy it again")
    shapes = {key: header.shape for key, header in read_header(folder / LORA_FILE).items()}
    check_fits(dict(network.named_modules()), shapes, name)
    network.load_lora_adapter(folder)
    network.fuse_lora()
    network.unload_lora()
    check_finite(network, f"{name} added to the weights")
    return Lora(name, own)
