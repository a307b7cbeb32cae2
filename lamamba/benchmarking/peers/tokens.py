"""Patches and timesteps as tokens, which the networks of plain layers share."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


def timestep_features(timestep: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal features of the timestep, cosines first: (b,) -> (b, width)."""
    return get_timestep_embedding(timestep, width, flip_sin_to_cos=True, downscale_freq_shift=0).to(dtype)


def to_image(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches together, (row, column, channel) within each: (b, h w, p p c) -> (b, c, h p, w p)."""
    (h, w), p = grid, patch_size
    x = tokens.view(len(tokens), h, w, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, h * p, w * p)


def run_with_skips(x: Tensor, encoder: nn.ModuleList, middle: nn.Module, decoder: nn.ModuleList) -> Tensor:
    """Blocks with long skips: the decoder's take the outputs of the encoder's, the last one first, as further channels.
    """
    skips = []
    for block in encoder:
        x = block(x)
        skips.append(x)
    x = middle(x)
    for block in decoder:
        x = block(torch.cat([x, skips.pop()], dim=-1))
    return x


class Patches(nn.Conv2d):
    """Non-overlapping patches, projected: (b, c, h p, w p) -> (b, h w, width)."""

    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).mT


class TokenTable(nn.Module):
    """Learned positions, added to tokens: (b, l, width) -> (b, l, width).

    Args:
        tokens: l.
        width: channels.
    """

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, tokens, width))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table
