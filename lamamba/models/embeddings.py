"""Where a token is, which time it is, which class is asked for: the network's three embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lamamba.config import Grid

TIMESTEP_FEATURES = 256
MAX_PERIOD = 10000


def _frequencies(places: Tensor, count: int) -> Tensor:
    """MAX_PERIOD^(-i / count) for i = 0 .. count - 1, with the precision and on the device of `places`."""
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=places.dtype, device=places.device) / count)


def position_table(grid: Grid, width: int) -> Tensor:
    """Sines and cosines of the column in the first half of the channels, of the row in the second: (h, w, width).

    Each half is [all sines, all cosines] with frequencies 10000^(-i / (width / 4)). Starting point of a learned table.
    """
    def encode(places: Tensor) -> Tensor:
        angles = places[:, None] * _frequencies(places, width // 4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)                  # (side, width / 2)

    height, columns = grid
    row = encode(torch.arange(height, dtype=torch.float64))[:, None].expand(-1, columns, -1)
    column = encode(torch.arange(columns, dtype=torch.float64))[None].expand(height, -1, -1)
    return torch.cat([column, row], dim=-1).float()


class PatchEmbedding(nn.Module):
    """p x p input pixels to one token: convolution with stride p, LayerNorm. (b, c, H, W) -> (b, H/p, W/p, width)."""

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
    """256 cosines and sines of the timestep, then Linear, SiLU, Linear. (b,) -> (b, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_in = nn.Linear(TIMESTEP_FEATURES, width)
        self.linear_out = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        for linear in (self.linear_in, self.linear_out):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, timestep: Tensor) -> Tensor:
        timestep = timestep.float()                                             # float32 in a bfloat16 model, too
        angles = timestep[:, None] * _frequencies(timestep, TIMESTEP_FEATURES // 2)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_in.weight.dtype)
        return self.linear_out(nn.functional.silu(self.linear_in(features)))
