"""Names, shapes and types of saved weights, compared with the configuration before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from torch import nn

from lamamba.config import UNetConfig
from lamamba.utils.files import read_json
from lamamba.utils.tensors import FLOATS, Header, read_header

T = TypeVar("T", bound=nn.Module)
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")

TENSORS_OF_A_BLOCK = 5
"""At least: a norm, the condition and the modulation."""


def saved_folder(name: str | Path, *, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The folder of a saved network; that of the hub's cache for a hub id, where configuration and weights are fetched.

    Args:
        name: a folder or a hub id.
        subfolder: of it.
        hub: revision, token, cache_dir and local_files_only are huggingface_hub's; others are not read.

    Returns:
        None where the hub has no such model, or cannot be reached and does not have it in its cache.
    """
    if Path(name).exists():
        return Path(name, subfolder or "")
    stem, ending = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
    files = ("config.json", SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, f"{stem}-*.{ending}")
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in files]
    options = {key: hub[key] for key in HUB_OPTIONS if hub.get(key) is not None}
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, **options), subfolder or "")
    except (OSError, ValueError):                                               # diffusers, asked next, says why
        return None


def is_quantized(folder: Path) -> bool:
    """Whether a folder of a saved network holds weights that a quantiser of diffusers has written."""
    path = folder / "config.json"
    return path.is_file() and "quantization_config" in read_json(path)


def read_config(folder: Path) -> UNetConfig:
    """The configuration of a saved network.

    Raises:
        ValueError: naming the file and the entry that does not fit; for quantised weights.
    """
    path = folder / "config.json"
    if is_quantized(folder):
        raise ValueError(
            f"{path}: its weights are quantised, which LaMambaUNet.from_pretrained reads; here give the network as it "
            "was before, with quantize"
        )
    values = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    try:
        return UNetConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_weights(make: Callable[[UNetConfig], T], config: UNetConfig, files: Iterable[Path], where: Path) -> T:
    """Check that files hold the weights of a network, before a network of the configuration's sizes is made.

    Args:
        make: makes a network.
        config: its configuration.
        files: its weights.
        where: for messages.

    Returns:
        The network, on the meta device.

    Raises:
        ValueError: naming every missing, unexpected and reshaped tensor, and those that are no real numbers.
    """
    found = {name: entry for file in files for name, entry in read_header(file).items()}
    table = found.get("position_embedding")
    expected = (*config.token_grid, config.width)
    if table is None or table.shape != expected:                                # bounds the grid by the file's size
        raise _misfit(where, [_fault("position_embedding", table, expected)])
    if TENSORS_OF_A_BLOCK * config.num_blocks > len(found):                     # and the depths
        raise _misfit(where, [f"depths={config.depths} and bottleneck_depth={config.bottleneck_depth} make "
                              f"{config.num_blocks} blocks, too many for {len(found)} tensors"])
    with torch.device("meta"):
        network = make(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    faults = [_fault(name, found.get(name), shape) for name, shape in shapes.items()
              if name not in found or found[name].shape != shape]
    faults += [f"unexpected: {name}" for name in found if name not in shapes]
    faults += [f"{name} has type {dtype}, not one of {', '.join(FLOATS)}" for name, (_, dtype) in found.items()
               if dtype not in FLOATS]
    if faults:
        raise _misfit(where, faults)
    return network


def _fault(name: str, found: Header | None, shape: tuple[int, ...]) -> str:
    return f"missing: {name}" if found is None else f"{name} has shape {found.shape}, the configuration needs {shape}"


def _misfit(where: Path, faults: list[str]) -> ValueError:
    shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
    return ValueError(f"the weights in {where} do not fit its config.json: {shown}")
