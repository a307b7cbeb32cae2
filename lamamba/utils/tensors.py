"""Safetensors files, read into memory, and their headers; pickles of tensors, of which nothing is executed.

A file that is mapped instead ends the process when somebody truncates it, and changes pictures when it is overwritten.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from lamamba.utils.files import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_ADVICE = (
    "as a pickle can run code when they are opened, only safetensors are read; official checkpoints are read by "
    "lamamba convert"
)
UNREADABLE = (
    RuntimeError, OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
    AssertionError, MemoryError, ImportError, struct.error, zipfile.BadZipFile,
)
"""What torch.load raises for damaged files; its own messages are of the allocator and the reader."""
FLOATS = ("F32", "BF16", "F16", "F64")
"""Types that weights may have, by safetensors' names."""


class Header(NamedTuple):
    """A tensor in a header."""

    shape: tuple[int, ...]
    dtype: str


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is damaged.
    """
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def read_header(path: Path) -> dict[str, Header]:
    """Shape and type of every tensor of a safetensors file; none is read.

    Raises: as `read_tensors`.
    """
    path.open("rb").close()                                                     # errors of the system name the file
    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}        # noqa: SIM118 (not a dict)
            return {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def read_pickle(path: Path, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """The content of a dict that torch.save has written, with string keys; nothing from it is executed.

    Args:
        path: of the file.
        allowed: classes besides tensors and plain values, as for torch.serialization.safe_globals.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is truncated, no such dict, or holds objects other than those.
    """
    path.open("rb").close()                                                     # errors of the system name the file
    try:
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        what = f"it asks for {named[1]}" if named else "it holds more than tensors and plain values"
        raise ValueError(f"{path} was not opened: {what}, and nothing from a checkpoint is executed") from error
    except UNREADABLE as error:
        raise ValueError(f"{path} is truncated, damaged or not a PyTorch file ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint or a state dict")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a network that diffusers has saved, one or, of a large network, several.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: when they are only a pickle, or the index of several is damaged.
    """
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        if pickles := [file for ending in PICKLES for file in folder.glob(f"*{ending}")]:
            raise ValueError(f"{pickles[0]}: weights {PICKLE_ADVICE}")
        raise FileNotFoundError(f"{folder} holds no weights: there is no {SAFETENSORS_WEIGHTS_NAME} in it")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map={str(names)[:40]!r} must be names of files by names of tensors")
    files = [folder / Path(name).name for name in sorted(set(names.values()))]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names {missing[0]}, which is missing")
    return files


def check_finite(network: nn.Module, where: str | Path) -> None:
    """Check that all parameters are numbers.

    Raises:
        ValueError: naming those that hold NaN or infinities.
    """
    bad = [name for name, weight in network.named_parameters() if not weight.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"{where}: {', '.join(bad[:3])}{more} hold NaN or infinities, so every picture would be black: take an "
            "earlier checkpoint"
        )
