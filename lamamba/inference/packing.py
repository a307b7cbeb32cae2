"""Weights in oneDNN's blocked layout, for inference on CPUs: Linear layers with the GELU behind them, convolutions.

A plain bfloat16 product reorders its weight in every call, a plain convolution too, in any precision; a packed one is
reordered once. In float32 PyTorch's plain product is MKL's, which some processors run a fifth slower than oneDNN's.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor, nn

from lamamba.models.blocks import MLP

PACKED_DTYPES = (torch.float32, torch.bfloat16)
FEWEST_WEIGHTS = 2**17
"""Of a float32 layer that is packed: a smaller one gains less than the call of oneDNN costs (40 microseconds)."""


class PackedLinear(nn.Module):
    """A Linear layer for inference with its weight in oneDNN's layout, and GELU (nn.GELU's `approximate`) after it."""

    def __init__(self, linear: nn.Linear, rows: int, gelu: str | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias.detach() if linear.bias is not None else None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self._activation: tuple[str, list[float], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self._activation)

    def _save_to_state_dict(self, *args: object) -> None:
        raise RuntimeError("packed weights cannot be saved: save the network before pack_weights(network)")


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have oneDNN's packed products of this dtype."""
    try:
        packed = PackedLinear(nn.Linear(32, 32, dtype=dtype), 32, "none")
        return dtype in PACKED_DTYPES and bool(torch.isfinite(packed(torch.ones(32, 32, dtype=dtype))).all())
    except (AttributeError, RuntimeError):
        return False


def pack_weights(model: nn.Module, rows: int) -> None:
    """Pack the Linear layers of a network on the CPU, in place, for products of about `rows` rows.

    All bfloat16 ones, and float32 ones of FEWEST_WEIGHTS or more; GELU right after one (in our MLP, in nn.Sequential)
    becomes part of the product. Quantised layers and the scan's small input projection (W_x, a raw parameter) stay as
    they are. The network can then only be run, without gradients: neither trained nor saved nor moved. Where `can_pack`
    is false, nothing changes.

    Raises:
        ValueError: when a weight is neither float32 nor bfloat16, or not on the CPU.
    """
    if isinstance(model, (MLP, nn.Sequential)):
        for (name, linear), (after, gelu) in pairwise(list(model.named_children())):
            if isinstance(linear, nn.Linear) and type(gelu) is nn.GELU and _pack(model, name, rows, gelu.approximate):
                setattr(model, after, nn.Identity())
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            _pack(model, name, rows)
        elif not getattr(child, "lora_variant", None):                          # DoRA reads the weight that it adapts
            pack_weights(child, rows)


def _pack(model: nn.Module, name: str, rows: int, gelu: str | None = None) -> bool:
    """Pack the Linear layer of this name, if it can be, and free its weight."""
    linear: nn.Linear = getattr(model, name)
    weight = linear.weight
    if hasattr(weight, "__tensor_flatten__"):                                   # quantised
        return False
    if weight.dtype not in PACKED_DTYPES or weight.device.type != "cpu":
        raise ValueError(
            f"pack_weights takes float32 or bfloat16 weights on the CPU, not {weight.dtype} on {weight.device}: "
            "call network.to('cpu', torch.bfloat16) first"
        )
    small = weight.dtype == torch.float32 and weight.numel() < FEWEST_WEIGHTS
    if small or not can_pack(weight.dtype):
        return False
    setattr(model, name, PackedLinear(linear, rows, gelu))
    linear.weight = None  # type: ignore[assignment]
    return True


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
