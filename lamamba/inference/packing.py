"""Weights in oneDNN's blocked layout, for inference on CPUs: bfloat16 Linear layers, convolutions.

A plain bfloat16 product reorders its weight in every call, a plain convolution too, in any precision; a packed one is
reordered once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A Linear layer for inference with its bfloat16 weight in oneDNN's layout."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias.detach() if linear.bias is not None else None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, *args: object) -> None:
        raise RuntimeError("packed weights cannot be saved: save the network before pack_weights(network)")


@functools.cache
def can_pack() -> bool:
    """Whether this build of torch and this processor have oneDNN's packed bfloat16 products."""
    try:
        linear = nn.Linear(32, 32).to(torch.bfloat16)
        return bool(torch.isfinite(PackedLinear(linear, 32)(torch.ones(32, 32, dtype=torch.bfloat16))).all())
    except (AttributeError, RuntimeError):
        return False


def pack_weights(model: nn.Module, rows: int) -> None:
    """Pack every Linear layer of a bfloat16 network on the CPU, in place, for products of about `rows` rows.

    The network can then only be run: neither trained nor saved nor moved. Where `can_pack` is false, nothing changes;
    layers that are quantised stay as they are.
    The scan's small input projection (W_x, a raw parameter) stays as it is.

    Raises:
        ValueError: when a weight is not bfloat16, or not on the CPU.
    """
    if not can_pack():
        return
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            weight = child.weight
            if hasattr(weight, "__tensor_flatten__"):                           # quantised
                continue
            if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
                raise ValueError(
                    f"pack_weights takes bfloat16 weights on the CPU, not {weight.dtype} on {weight.device}: "
                    "call network.to('cpu', torch.bfloat16) first"
                )
            setattr(model, name, PackedLinear(child, rows))
            child.weight = None  # type: ignore[assignment]
        else:
            pack_weights(child, rows)


class PackedConv2d(nn.Module):
    """A convolution for inference, its weight in oneDNN's layout for inputs as large as the first.

    Other inputs are computed as well, perhaps in another layout than theirs.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        c = convolution
        self.bias = c.bias.detach() if c.bias is not None else None
        self.weight = c.weight.detach()
        self._settings = list(c.padding), list(c.stride), list(c.dilation), c.groups
        self._is_packed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._settings, list(x.shape))
            self._is_packed = True
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self._settings, "none", [], "")

    def _save_to_state_dict(self, *args: object) -> None:
        raise RuntimeError("packed weights cannot be saved: save the network before pack_convolutions(network)")


@functools.cache
def can_pack_convolutions(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have oneDNN's packed convolutions of this dtype."""
    try:
        convolution = PackedConv2d(nn.Conv2d(8, 8, 3, dtype=dtype))
        return bool(torch.isfinite(convolution(torch.ones(1, 8, 4, 4, dtype=dtype))).all())
    except (AttributeError, RuntimeError):
        return False


def pack_convolutions(model: nn.Module) -> None:
    """Pack every plain 2-D convolution of a network on the CPU, in place, when it first runs.

    The network can then only be run, without gradients: neither trained nor saved nor moved. Subclasses of nn.Conv2d
    stay as they are, and so does a weight for whose dtype `can_pack_convolutions` is false.
    """
    for name, child in list(model.named_children()):
        if type(child) is nn.Conv2d and _packs(child):
            setattr(model, name, PackedConv2d(child))
            child.weight = None  # type: ignore[assignment]
        else:
            pack_convolutions(child)


def _packs(convolution: nn.Conv2d) -> bool:
    plain = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return plain and can_pack_convolutions(convolution.weight.dtype)
