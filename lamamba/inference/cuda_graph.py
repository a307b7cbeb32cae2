"""A forward pass as a CUDA graph: the GPU goes from kernel to kernel without waiting for Python.

A graph keeps the memory of its pass: the activations that are held at once, inputs and outputs. For LaMamba-XL in
bfloat16 that is 14 MB for each image of 256 pixels and 54 MB for each of 512 (benchmarks/gpu_launches.py), guided pairs
counting as two; no other work can use it while the graph lives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamamba.models.unet import Constants, LaMambaUNet

logger = logging.getLogger("lamamba.inference")


def can_record(x: Tensor) -> bool:
    """Whether a forward pass of x can be recorded: without gradients, on a CUDA device."""
    return x.device.type == "cuda" and not torch.is_grad_enabled()


class RecordedNetwork:
    """A network called with x and conditioning of one shape, recorded as a CUDA graph; no gradients.

    Later changes of the weights count if they are made in place, but not in the constants.

    Args:
        model: the network, on a CUDA device.
        x: (b, c, h, w),
        conditioning: (b, condition_outputs), and
        deep_features: (b, h, w, width) or None, of the shapes of later calls.
        return_features: names of the features that calls return beside the output.
        constants: the network's, or None.
    """

    def __init__(
        self, model: LaMambaUNet, x: Tensor, conditioning: Tensor, deep_features: Tensor | None = None,
        return_features: Sequence[str] = (), constants: Constants | None = None,
    ):
        self._x, self._conditioning = x.clone(), conditioning.clone()
        self._deep_features = None if deep_features is None else deep_features.clone()
        self._return_features = tuple(return_features)
        self._geometries, self._constants = model.geometries, constants         # replays read them: never freed before
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.no_grad(), torch.cuda.device(x.device):
            with torch.cuda.stream(stream):                                     # kernels are compiled and chosen here
                self._run(model)
            torch.cuda.current_stream(x.device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # other threads may call CUDA meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = self._run(model)

    def _run(self, model: LaMambaUNet) -> Any:
        return model(
            self._x, None, conditioning=self._conditioning, constants=self._constants,
            deep_features=self._deep_features, return_features=self._return_features,
        )

    def takes(self, x: Tensor, conditioning: Tensor) -> bool:
        """Whether it was recorded for tensors of these shapes, dtypes and devices."""
        return all(
            given.shape == kept.shape and given.dtype == kept.dtype and given.device == kept.device
            for given, kept in ((x, self._x), (conditioning, self._conditioning))
        )

    def __call__(self, x: Tensor, conditioning: Tensor, deep_features: Tensor | None = None) -> Any:
        """The network's output, (b, out_channels, h, w), and its features if these were recorded; newly allocated."""
        self._x.copy_(x)
        self._conditioning.copy_(conditioning)
        if deep_features is not None:
            assert self._deep_features is not None
            self._deep_features.copy_(deep_features)
        self._graph.replay()
        if not self._return_features:
            return self._output.clone()
        output, features = self._output
        return output.clone(), {name: feature.clone() for name, feature in features.items()}


def record(
    model: LaMambaUNet, x: Tensor, conditioning: Tensor, deep_features: Tensor | None = None,
    return_features: Sequence[str] = (), constants: Constants | None = None,
) -> RecordedNetwork | None:
    """Record a forward pass; None, with a warning in the log, where that fails."""
    try:
        return RecordedNetwork(model, x, conditioning, deep_features, return_features, constants)
    except RuntimeError as error:
        logger.warning("the network cannot be recorded as a CUDA graph, so it runs kernel by kernel: %s", error)
        return None
