"""Feature networks: what turns images into the vectors that distances are taken between.

Any callable will do (`CallableFeatures`); Inception gives FID as it is published, DINOv2 gives FD-DINOv2, and a small
classifier of digits serves small-scale work.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamamba.config import unknown_name
from lamamba.metrics.inception import load_inception

Outputs = dict[str, np.ndarray]
"""By name, each (images, ...) float32: "features" always; "spatial" and "logits" where the network has them."""


@dataclass(frozen=True)
class FeatureNetworkInfo:
    """All that must agree for two results to be comparable."""

    name: str
    sha256: str
    """Of the weights; "" where there is nothing to hash."""
    resize: str
    """How images come to the network's size, in words."""
    channels: int
    """1: grey, 3: colour."""


class FeatureNetwork(Protocol):
    facts: FeatureNetworkInfo
    distance_name: str
    """What its Fréchet distance is called."""
    knows_classes: bool
    """Whether its logits are of the classes that images are asked to show."""

    def __call__(self, images: np.ndarray) -> Outputs:
        """uint8 images (n, h, w, channels) to features."""
        ...


def _to_tensor(images: np.ndarray, device: torch.device | str) -> Tensor:
    """(n, h, w, c) uint8 to (n, c, h, w) float32, 0 .. 255."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()


def _to_arrays(outputs: Mapping[str, Tensor]) -> Outputs:
    return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}


class InceptionFeatures:
    """FID's own network. See `lamamba.metrics.inception`."""

    distance_name = "FID"
    knows_classes = False                                                       # 1008, in an order of its own

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        model, digest = load_inception(weights)
        self._model, self._device = model.to(device), device
        self.facts = FeatureNetworkInfo("inception-2015-12-05", digest, "299 x 299, bilinear as TensorFlow 1", 3)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Outputs:
        return _to_arrays(self._model(_to_tensor(images, self._device)))


class DinoFeatures:
    """DINOv2's class token after the final norm, as EDM2 computes FD-DINOv2: ViT-L/14 on 224 x 224 pixels.

    Args:
        weights: a folder or hub id of transformers' Dinov2Model; only safetensors are read.

    Raises:
        RuntimeError: when transformers is not installed.
        OSError, ValueError: when there is no such model, or it is another one.
    """

    distance_name = "FD-DINOv2"
    knows_classes = False
    SIDE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        try:
            from transformers import Dinov2Model
        except ModuleNotFoundError as error:
            raise RuntimeError("DINOv2 comes with transformers: pip install 'lamamba-diff[dinov2]'") from error
        model = Dinov2Model.from_pretrained(str(weights or "facebook/dinov2-large"), use_safetensors=True)
        _fit_positions(model, self.SIDE)
        self._model, self._device = model.eval().requires_grad_(False).to(device), device
        name = f"dinov2-{model.config.hidden_size}-{model.config.num_hidden_layers}"
        resize = f"{self.SIDE} x {self.SIDE}, bicubic with antialiasing"
        self.facts = FeatureNetworkInfo(name, hash_weights(model), resize, 3)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Outputs:
        x = _to_tensor(images, self._device) / 255
        x = F.interpolate(x, size=(self.SIDE, self.SIDE), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return _to_arrays({"features": self._model(pixel_values=(x - mean) / std).pooler_output})


def _fit_positions(model: Any, side: int) -> None:
    """Bring position embeddings to the grid of `side` as DINOv2's own code does: a scale 0.1 tokens too large.

    transformers leaves that oddity out; published figures have it.
    """
    embeddings = model.embeddings
    table = embeddings.position_embeddings.detach()                             # (1, 1 + M M, d), the class token first
    old, new = round((table.shape[1] - 1) ** 0.5), side // model.config.patch_size
    if old == new:
        return
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    scale = (new + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    if grid.shape[-2:] != (new, new):
        raise ValueError(f"position embeddings of {old} x {old} do not come to {new} x {new}; use dinov2-large")
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(table)
    embeddings.position_embeddings = torch.nn.Parameter(torch.cat([table[:, :1], grid], dim=1))


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of a network's tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().float().numpy()).tobytes())
    return digest.hexdigest()


class CallableFeatures:
    """Any function as a feature network.

    Args:
        function: uint8 images (n, h, w, channels) to features (n, d), or to a dict with "features" and, if it has them,
            "spatial" and "logits".
        name: by which results are told apart; with `sha256`, of the weights, where it has some.
        channels: 1 for grey images, 3 for colour.
        resize: what it does about sizes, in words.
        knows_classes: its logits are of the classes that images are asked to show, so that they give an accuracy.
    """

    def __init__(
        self, function: Callable[[np.ndarray], Any], name: str, *, channels: int = 3, sha256: str = "",
        resize: str = "its own", knows_classes: bool = False,
    ):
        self._function, self.knows_classes = function, knows_classes
        self.facts = FeatureNetworkInfo(name, sha256, resize, channels)
        self.distance_name = f"FD-{name}"

    def __call__(self, images: np.ndarray) -> Outputs:
        outputs = self._function(images)
        outputs = outputs if isinstance(outputs, Mapping) else {"features": outputs}
        arrays = {name: np.asarray(value, dtype=np.float32) for name, value in outputs.items()}
        shape = arrays["features"].shape if "features" in arrays else None
        if shape is None or len(shape) != 2 or any(len(value) != len(images) for value in arrays.values()):
            made = {name: value.shape for name, value in arrays.items()}
            raise ValueError(f"{self.facts.name} made {made} of {len(images)} images; features (images, d) are needed")
        return arrays


NETWORKS = ("inception", "dinov2", "digits")


def open_network(name: str, weights: str | None, device: torch.device) -> FeatureNetwork:
    """A feature network by its name on the command line.

    Raises:
        ValueError: for an unknown name, or weights that are not the network's.
        OSError, RuntimeError: when its weights or packages are missing.
    """
    if name == "inception":
        return InceptionFeatures(weights, device)
    if name == "dinov2":
        return DinoFeatures(weights, device)
    if weights is not None:
        raise ValueError(f"--weights is for inception and dinov2; {name} brings its own")
    if name == "digits":
        from lamamba.metrics.digits_network import DigitFeatures

        return DigitFeatures()
    module, _, attribute = name.partition(":")
    if not attribute:
        raise unknown_name("feature network", name, NETWORKS)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--features {name}: {error}; module:name is a function that Python can import") from error
    return CallableFeatures(function, name)
