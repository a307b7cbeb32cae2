"""bfloat16 weights in oneDNN's blocked layout, for inference on CPUs.

A plain bfloat16 product reorders its weight in every call; a packed one is reordered once.
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
