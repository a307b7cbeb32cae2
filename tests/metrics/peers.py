"""Modules of the public evaluators, where they are installed, imported without torchvision.

`pip install --no-deps torch-fidelity pytorch-fid`, or LAMAMBA_EVALUATORS: a folder with the unpacked packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from lamamba.metrics.inception import Inception


def _folder(package: str) -> Path:
    given = os.environ.get("LAMAMBA_EVALUATORS")
    if given and (Path(given) / package).is_dir():
        return Path(given) / package
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not here (see tests/metrics/peers.py)")
    return Path(next(iter(spec.submodule_search_locations)))


class _Anything(types.ModuleType):
    """Stands for modules that a module only imports."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def peer(package: str, module: str, monkeypatch: pytest.MonkeyPatch, *absent: str) -> types.ModuleType:
    """`package.module`, without the package's own __init__ and without the absent modules."""
    parent = types.ModuleType(package)
    parent.__path__ = [str(_folder(package))]
    monkeypatch.setitem(sys.modules, package, parent)
    for name in absent:
        monkeypatch.setitem(sys.modules, name, _Anything(name))
    for name in [name for name in sys.modules if name.startswith(f"{package}.") and name not in absent]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module(f"{package}.{module}")


def random_inception() -> dict[str, Tensor]:
    """Random weights with the names of the public file; activations keep their scale through all layers."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.6, 1.4)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.uniform_(-0.2, 0.4)
    return state
