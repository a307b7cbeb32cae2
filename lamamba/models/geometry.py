"""What a stage must know of its grid: reading orders, windows, and who may look at whom. Made once, no parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamamba.config import Grid
from lamamba.ops import scan_paths


def relative_positions(window: Grid) -> Tensor:
    """Row of the bias table for every (query, key) pair of a window: (tokens, tokens), as in Swin."""
    rows, columns = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None] + window[0] - 1
    right = columns[:, None] - columns[None] + window[1] - 1
    return down * (2 * window[1] - 1) + right


def padded_grid(grid: Grid, window: Grid) -> Grid:
    """The grid, enlarged at the bottom and right until the window divides it."""
    return grid[0] + -grid[0] % window[0], grid[1] + -grid[1] % window[1]


def window_shift(grid: Grid, window: Grid) -> Grid:
    """How far shifted blocks roll each axis: half a window, or nothing where one window covers the axis."""
    down, right = (side // 2 if length > side else 0 for length, side in zip(grid, window, strict=True))
    return down, right


def same_region(grid: Grid, window: Grid, shift: Grid) -> Tensor | None:
    """Which pairs of a window may see each other after padding and rolling: (windows, tokens, tokens) bool, or None.

    A rolled window joins tokens that are not neighbours; Swin cuts each axis into three slices, and only tokens of the
    same slices see each other. Padding is one more region, so that no real token sees it. None when all pairs may.
    """
    padded = padded_grid(grid, window)
    if shift == (0, 0) and padded == grid:
        return None

    def slices(length: int, padded_length: int, side: int, by: int) -> Tensor:
        place = torch.arange(padded_length)
        region = torch.zeros(padded_length, dtype=torch.int64)
        if by:
            region = (place >= padded_length - side).long() + (place >= padded_length - by).long()
        is_padding = torch.roll(place >= length, -by)
        return torch.where(is_padding, 3, region)

    row = slices(grid[0], padded[0], window[0], shift[0])
    column = slices(grid[1], padded[1], window[1], shift[1])
    padding = (row[:, None] == 3) | (column[None] == 3)
    region = torch.where(padding, -1, row[:, None] * 3 + column[None])
    region = region.view(padded[0] // window[0], window[0], padded[1] // window[1], window[1])
    region = region.transpose(1, 2).reshape(-1, window[0] * window[1])
    return region[:, :, None] == region[:, None]


class Geometry(nn.Module):
    """One stage's grid as tables on the network's device (buffers that are not saved)."""

    paths: Tensor
    relative_positions: Tensor
    mask: Tensor | None
    shifted_mask: Tensor | None

    def __init__(self, grid: Grid, window: Grid, scan: str):
        super().__init__()
        self.grid, self.window = grid, window
        self.shift = window_shift(grid, window)
        self.register_buffer("paths", scan_paths(*grid, scan).clone(), persistent=False)
        self.register_buffer("relative_positions", relative_positions(window).flatten(), persistent=False)
        self.register_buffer("mask", same_region(grid, window, (0, 0)), persistent=False)
        self.register_buffer("shifted_mask", same_region(grid, window, self.shift), persistent=False)
