"""Index tables of a stage's token grid: scan paths, relative positions and attention masks. No parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamamba.config import Grid
from lamamba.ops import scan_paths


def relative_positions(window: Grid) -> Tensor:
    """Row of the bias table for every (query, key) pair of a window: (tokens, tokens) int64, as in Swin."""
    rows, columns = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None] + window[0] - 1
    right = columns[:, None] - columns[None] + window[1] - 1
    return down * (2 * window[1] - 1) + right


def padded_grid(grid: Grid, window: Grid) -> Grid:
    """The grid padded at the bottom and right to a multiple of the window."""
    return grid[0] + -grid[0] % window[0], grid[1] + -grid[1] % window[1]


def window_shift(grid: Grid, window: Grid) -> Grid:
    """Shift of the shifted blocks in tokens, (rows, columns): half a window, or 0 where one window covers the axis."""
    down, right = (side // 2 if length > side else 0 for length, side in zip(grid, window, strict=True))
    return down, right


def attention_mask(grid: Grid, window: Grid, shift: Grid) -> Tensor | None:
    """Attention mask of the padded and rolled grid: (windows, tokens, tokens) bool, True where a pair attends.

    A rolled window joins tokens that are not neighbours on the grid. Swin cuts each axis into three slices, and only
    tokens of the same slices attend to each other; padding is a region of its own. None where every pair attends.
    """
    padded = padded_grid(grid, window)
    if shift == (0, 0) and padded == grid:
        return None

    def slices(length: int, padded_length: int, side: int, by: int) -> Tensor:
        index = torch.arange(padded_length)
        region = torch.zeros(padded_length, dtype=torch.int64)
        if by:
            region = (index >= padded_length - side).long() + (index >= padded_length - by).long()
        is_padding = torch.roll(index >= length, -by)
        return torch.where(is_padding, 3, region)

    row = slices(grid[0], padded[0], window[0], shift[0])
    column = slices(grid[1], padded[1], window[1], shift[1])
    padding = (row[:, None] == 3) | (column[None] == 3)
    region = torch.where(padding, -1, row[:, None] * 3 + column[None])
    region = region.view(padded[0] // window[0], window[0], padded[1] // window[1], window[1])
    region = region.transpose(1, 2).reshape(-1, window[0] * window[1])
    return region[:, :, None] == region[:, None]


class Geometry(NamedTuple):
    """A stage's grid: its sides, windows and tables."""

    grid: Grid
    window: Grid
    shift: Grid
    """Of the shifted blocks, as `window_shift` gives it."""
    paths: Tensor
    """(4, l) int64 scan orders."""
    relative_positions: Tensor
    """(tokens^2,) int64, `relative_positions` in one row."""
    mask: Tensor | None
    """Of blocks without a shift, as `attention_mask` gives it."""
    shifted_mask: Tensor | None

    def to(self, device: torch.device | str) -> Geometry:
        """The same with its tables on a device."""
        tables: dict[str, Any] = {name: getattr(self, name) for name in TABLES}
        return self._replace(**{name: table.to(device) for name, table in tables.items() if table is not None})


TABLES = ("paths", "relative_positions", "mask", "shifted_mask")


@torch.inference_mode(False)                                                    # else no later training could use them
def make_geometry(grid: Grid, window: Grid, scan: str) -> Geometry:
    """Compute the tables of a grid (height, width) in tokens for windows of this size and a kind of scan paths."""
    shift = window_shift(grid, window)
    return Geometry(
        grid, window, shift, scan_paths(*grid, scan).clone(), relative_positions(window).flatten(),
        attention_mask(grid, window, (0, 0)), attention_mask(grid, window, shift),
    )
