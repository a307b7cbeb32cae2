"""lamamba.convert: official checkpoints to our format, and back."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from lamamba.config import UNetConfig
from lamamba.models.official import load_official, to_official
from lamamba.options.base import verb
from lamamba.options.convert import ConvertOptions
from lamamba.pretrained import is_shipped
from lamamba.runs.metadata import assumed_metadata
from lamamba.runs.model import open_network
from lamamba.utils.files import check_folder, replacing
from lamamba.utils.text import counted

logger = logging.getLogger("lamamba.convert")


@dataclass(frozen=True)
class ConvertResult:
    """A converted network."""

    path: Path
    """The folder in our format, or the official .pt file."""
    config: UNetConfig
    num_tensors: int
    """In the official file that was written; 0 where a folder was."""

    def __str__(self) -> str:
        config = self.config
        if self.num_tensors:
            return f"{self.path}: {self.num_tensors} tensors under the official names, as \"model\" and \"ema\""
        return (
            f"{self.path}: width {config.width}, {config.num_heads} heads, window {config.window_size}, state size "
            f"{config.state_size}, {config.scan} scan, {counted(config.num_classes, 'class')}, "
            f"{config.token_grid} tokens"
        )


@verb
def convert(options: ConvertOptions) -> ConvertResult:
    """Convert an official LaMamba-Diff checkpoint (.pt) to a folder in our format, or a folder back to .pt.

    Nothing in the checkpoint is executed. The target is written whole or not at all.

    Raises:
        FileExistsError: when the target exists.
        FileNotFoundError: when the source does not.
        ValueError: when the source is neither, is damaged, or cannot be expressed in the other format.
    """
    source, target = options.source, options.target
    check_folder(target, is_new=True)
    is_shipped_model = is_shipped(source)
    if not source.exists() and not is_shipped_model:
        raise FileNotFoundError(f"{source} does not exist; give an official .pt file or a model folder")
    if not source.is_dir() and not is_shipped_model:
        return _from_official(options)
    if options.weights:
        raise ValueError("weights chooses among an official checkpoint's; a folder has one set: leave it out")
    return _to_official(source, target)


def _from_official(options: ConvertOptions) -> ConvertResult:
    target = options.target
    if target.suffix == ".pt":
        raise ValueError(f"both {options.source} and {target} are .pt files; the target must be a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = load_official(options.source, weights=options.weights)
    for warning in caught:
        logger.warning("%s", warning.message)
    with replacing(target) as temporary:
        model.save_pretrained(temporary)
        assumed_metadata(model.architecture).save(temporary / "sampling.json")
    return ConvertResult(target, model.architecture, 0)


def _to_official(source: Path, target: Path) -> ConvertResult:
    if target.suffix != ".pt":
        raise ValueError(f"{source} is a folder in our format, so the target must be a .pt file, not {target}")
    model, _ = open_network(source)
    state = to_official(model)
    with replacing(target) as temporary, temporary.open("wb") as file:          # a path would be written into the file
        torch.save({"model": state, "ema": state}, file)
    return ConvertResult(target, model.architecture, len(state))
