"""Feature networks by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

from lamamba.config import unknown_name
from lamamba.metrics.digits_network import DigitFeatures
from lamamba.metrics.dinov2 import DinoFeatures
from lamamba.metrics.features import CallableFeatures, FeatureNetwork
from lamamba.metrics.inception import InceptionFeatures
from lamamba.utils.files import sha256
from lamamba.utils.text import shown

NETWORKS = ("inception", "dinov2", "digits")


def open_network(name: str, weights: str | None, device: torch.device) -> FeatureNetwork:
    """Open a feature network by name.

    Args:
        name: one of NETWORKS, or "module:function", a function from uint8 images (n, h, w, 3) to features (n, d).
        weights: of inception (a file) or dinov2 (a folder or hub id); by default the published ones.
        device: for the network.

    Raises:
        ValueError: for an unknown name, or weights that are not the network's.
        OSError, RuntimeError: when its weights or packages are missing.
    """
    if name == "inception":
        return InceptionFeatures(weights, device)
    if name == "dinov2":
        return DinoFeatures(weights, device)
    if weights is not None:
        raise ValueError(f"weights={shown(weights)} is for inception and dinov2; {name} brings its own")
    if name == "digits":
        return DigitFeatures()
    module, _, attribute = name.partition(":")
    if not attribute:
        raise unknown_name("feature network", name, NETWORKS)
    imported = _import(module, name)
    function, file = getattr(imported, attribute, None), Path(getattr(imported, "__file__", None) or "")
    if not callable(function):
        raise ValueError(f"features={name!r}: {module} has no function {attribute}; it may be misspelt")
    return CallableFeatures(function, name, sha256=sha256(file) if file.is_file() else "")


def _import(module: str, name: str) -> ModuleType:
    """A module by name, of the current folder, too, which Python's programs (unlike python -m) do not look into."""
    here, module = str(Path.cwd()), module.removesuffix(".py")
    sys.path.append(here)
    try:
        return importlib.import_module(module)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"features={name!r}: {error}; module:function is of {module.replace('.', '/')}.py in the current folder, "
            "or of a package that Python can import"
        ) from error
    finally:
        sys.path.remove(here)
