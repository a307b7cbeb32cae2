"""Feature networks: images to the vectors that distances between image sets are computed on.

`FeatureNetwork` is what the evaluation needs of one; `CallableFeatures` makes one of any function. The networks are
opened by name in `lamamba.metrics.networks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lamamba.options.base import checked

Outputs = dict[str, np.ndarray]
"""By name, each (n, ...) float32: "features" always; "spatial" and "logits" where the network has them."""


@checked
@dataclass(frozen=True)
class FeatureNetworkInfo:
    """Identity of a feature network: results compare only where all of it is equal."""

    name: str
    sha256: str
    """Of the weights, or of the file of a function of your own; "" where there is neither."""
    resize: str
    """How images are brought to the network's size, in words."""
    channels: int
    """1: grey, 3: colour."""


class FeatureNetwork(Protocol):
    info: FeatureNetworkInfo
    distance_name: str
    """Name of the Fréchet distance on its features."""
    has_class_logits: bool
    """Whether its logits are over the classes that images are conditioned on, so that they give an accuracy."""

    def __call__(self, images: np.ndarray) -> Outputs:
        """Features of uint8 images (n, h, w, channels)."""
        ...


def to_tensor(images: np.ndarray, device: torch.device | str) -> Tensor:
    """uint8 images (n, h, w, c) as (n, c, h, w) float32, 0 .. 255."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()


def to_arrays(outputs: Mapping[str, Tensor]) -> Outputs:
    """Tensors of any device as float32 arrays."""
    return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of a network's tensors, sorted by name; without batch norms' counters, which not all files have."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(".num_batches_tracked"):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(np.ascontiguousarray(tensor.cpu().float().numpy()).tobytes())
    return digest.hexdigest()


class CallableFeatures:
    """Any function as a feature network.

    Args:
        function: uint8 images (n, h, w, channels) to features (n, d), or to a dict with "features" and, if it has them,
            "spatial" and "logits".
        name: identifies it in results, together with `sha256`, of its weights, where it has some.
        channels: 1 for grey images, 3 for colour.
        resize: how it resizes images, in words.
        has_class_logits: whether its logits are over the classes that images are conditioned on, so that they give an
            accuracy.

    Raises (when called):
        ValueError: when the function returns no features (n, d).
        RuntimeError: when it raises an exception.
    """

    def __init__(
        self, function: Callable[[np.ndarray], Any], name: str, *, channels: int = 3, sha256: str = "",
        resize: str = "its own", has_class_logits: bool = False,
    ):
        self._function, self.has_class_logits = function, has_class_logits
        self.info = FeatureNetworkInfo(name, sha256, resize, channels)
        self.distance_name = f"FD-{name}"

    def __call__(self, images: np.ndarray) -> Outputs:
        try:
            outputs = self._function(images)
        except Exception as error:                                              # whatever a function of others raises
            raise RuntimeError(f"features {self.info.name} failed: {type(error).__name__}: {error}") from error
        outputs = outputs if isinstance(outputs, Mapping) else {"features": outputs}
        arrays = {name: np.asarray(value, dtype=np.float32) for name, value in outputs.items()}
        if "features" not in arrays or any(value.shape[:-1] != (len(images),) for value in arrays.values()):
            made = {name: value.shape for name, value in arrays.items()}
            raise ValueError(f"{self.info.name} made {made} of {len(images)} images; features (images, d) are needed")
        return arrays
