"""Patch, position and timestep embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lamamba.config import Grid

TIMESTEP_FEATURES = 256
SCALAR_FREQUENCIES = 8
MAX_PERIOD = 10000


def _frequencies(like: Tensor, count: int) -> Tensor:
    """MAX_PERIOD^(-i / count) for i = 0 .. count - 1, in the dtype and on the device of `like`."""
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=like.dtype, device=like.device) / count)


def position_table(grid: Grid, width: int) -> Tensor:
    """2-D sinusoidal position embedding, (h, w, width): initial values of the learned table.

    The first half of the channels encodes the column, the second the row; each half is [all sines, all cosines] with
    frequencies 10000^(-i / (width / 4)).
    """
    def encode(indices: Tensor) -> Tensor:
        angles = indices[:, None] * _frequencies(indices, width // 4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)                  # (side, width / 2)

    height, columns = grid
    row = encode(torch.arange(height, dtype=torch.float64))[:, None].expand(-1, columns, -1)
    column = encode(torch.arange(columns, dtype=torch.float64))[None].expand(height, -1, -1)
    return torch.cat([column, row], dim=-1).float()


class PatchEmbedding(nn.Module):
    """p x p convolution with stride p, then LayerNorm: (b, c, H, W) -> (b, H/p, W/p, width)."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.projection.weight.flatten(1))
        assert self.projection.bias is not None
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.projection(x).permute(0, 2, 3, 1))


class TimestepEmbedding(nn.Module):
    """256 sinusoidal features of the timestep (cosines first), then Linear, SiLU, Linear: (b,) -> (b, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_in = nn.Linear(TIMESTEP_FEATURES, width)
        self.linear_out = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        for linear in (self.linear_in, self.linear_out):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        timestep = timestep.float()                                             # also in a bfloat16 model
        angles = timestep[:, None] * _frequencies(timestep, TIMESTEP_FEATURES // 2)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_out(nn.functional.silu(self.linear_in(features)))


class ScalarEmbedding(nn.Module):
    """Smooth embedding of a number in 0 .. 1, zero at the start of a training: (b,) -> (b, width).

    The number and sin(pi k z), cos(pi k z), k = 1 .. 8, then Linear, SiLU, Linear. Its few, low frequencies are ours:
    a flow map must be smooth in its second time, and the last weights are zero so that a network that gets this input
    computes at first what it did without.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear_in = nn.Linear(1 + 2 * SCALAR_FREQUENCIES, width)
        self.linear_out = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear_out.weight)

    def forward(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        z = z.float()[:, None]
        angles = math.pi * torch.arange(1, SCALAR_FREQUENCIES + 1, dtype=z.dtype, device=z.device) * z
        features = torch.cat([z, angles.sin(), angles.cos()], dim=-1).to(dtype)
        return self.linear_out(nn.functional.silu(self.linear_in(features)))
