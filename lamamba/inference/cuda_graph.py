"""A forward pass as a CUDA graph, for batches so small that launching kernels takes longer than running them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lamamba.models.unet import LaMambaUNet

logger = logging.getLogger("lamamba.inference")

SMALL_BATCH_TOKENS = 2**14
"""Tokens of a batch up to which replaying is worth its memory: 16 images of 32 x 32."""
WARM_UP_PASSES = 3


def is_small(x: Tensor, model: LaMambaUNet) -> bool:
    """Whether a forward pass of x (b, c, h, w) is worth recording: on a CUDA device, and small."""
    p = model.architecture.patch_size
    return x.device.type == "cuda" and x.shape[0] * x.shape[2] * x.shape[3] // p**2 <= SMALL_BATCH_TOKENS


class RecordedNetwork:
    """A network called with x and conditioning of one shape, recorded as a CUDA graph; no gradients.

    Later changes of the weights count if they are made in place.

    Args:
        model: the network, on a CUDA device.
        x: (b, c, h, w) and
        conditioning: (b, condition_outputs), of the shapes of later calls.
    """

    def __init__(self, model: LaMambaUNet, x: Tensor, conditioning: Tensor):
        self._x, self._conditioning = x.clone(), conditioning.clone()
        self._geometries = model.geometries                                     # replays read them: never freed before
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.no_grad(), torch.cuda.device(x.device):
            with torch.cuda.stream(stream):                                     # kernels are compiled and chosen here
                for _ in range(WARM_UP_PASSES):
                    model(self._x, None, conditioning=self._conditioning)
            torch.cuda.current_stream(x.device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = model(self._x, None, conditioning=self._conditioning)

    def takes(self, x: Tensor, conditioning: Tensor) -> bool:
        """Whether it was recorded for tensors of these shapes, dtypes and devices."""
        return all(
            given.shape == kept.shape and given.dtype == kept.dtype and given.device == kept.device
            for given, kept in ((x, self._x), (conditioning, self._conditioning))
        )

    def __call__(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """The network's output, (b, out_channels, h, w), newly allocated."""
        self._x.copy_(x)
        self._conditioning.copy_(conditioning)
        self._graph.replay()
        return self._output.clone()


def record(model: LaMambaUNet, x: Tensor, conditioning: Tensor) -> RecordedNetwork | None:
    """Record a forward pass; None, with a warning in the log, where that fails."""
    try:
        return RecordedNetwork(model, x, conditioning)
    except RuntimeError as error:
        logger.warning("the network cannot be recorded as a CUDA graph, so it runs kernel by kernel: %s", error)
        return None
