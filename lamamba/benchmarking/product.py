"""One large matrix product: what a machine can reach, in the same run as the networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamamba.benchmarking.flops import Cost

NAME = "product"


def product_side(device: str) -> int:
    """Side of the matrices on a device: GPUs need larger ones to be busy."""
    return 3072 if torch.device(device).type == "cpu" else 8192


class MatrixProduct(nn.Module):
    """x W^T of square matrices, called as a network is; its weight is packed as a network's are."""

    def __init__(self, side: int):
        super().__init__()
        self.linear = nn.Linear(side, side, bias=False)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.linear(x)


def product_cost(side: int) -> Cost:
    """Of one product, with x and its result as activations."""
    return Cost(parameters=side**2, matrix=side**3, scan=0, layer_norm=0, activation_bytes=2 * 4 * side**2)
