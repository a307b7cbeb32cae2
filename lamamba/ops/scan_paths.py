"""Scan paths: the orders in which the selective scan traverses a grid, for any height and width.

A path is a permutation of the grid: paths[k, t] is the row-major index of the t-th token of direction k.

    continuous    neighbours on the path are neighbours on the grid (snakes; paper, Section 3.2)
        0  rows from the top; even rows left to right, odd rows right to left
        1  path 0 reversed
        2  columns from the left; even columns bottom to top, odd columns top to bottom
        3  path 2 reversed
    cross         VMamba's cross-scan, the paper's ablation
        0  row by row      1  column by column      2  path 0 reversed      3  path 1 reversed
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lamamba.config import check_known

NUM_PATHS = 4


def _grid_orders(height: int, width: int, scan: str) -> np.ndarray:
    tokens = np.arange(height * width).reshape(height, width)
    if scan == "cross":
        row_by_row, column_by_column = tokens.ravel(), tokens.T.ravel()
        return np.stack([row_by_row, column_by_column, row_by_row[::-1], column_by_column[::-1]])
    rows = tokens.copy()
    rows[1::2] = rows[1::2, ::-1]
    columns = tokens[::-1].T.copy()
    columns[1::2] = columns[1::2, ::-1]
    return np.stack([rows.ravel(), rows.ravel()[::-1], columns.ravel(), columns.ravel()[::-1]])


@lru_cache(maxsize=256)
@torch.inference_mode(False)                                                    # a backward pass may use them later
def _cached_paths(height: int, width: int, scan: str, device: torch.device) -> Tensor:
    # from_numpy, not torch.tensor: independent of a surrounding `with torch.device(...)`
    return torch.from_numpy(_grid_orders(height, width, scan)).to(device)


def scan_paths(height: int, width: int, scan: str = "continuous", device: torch.device | str = "cpu") -> Tensor:
    """Return the four scan paths of a grid: (4, height * width) int64 token indices.

    Cached for each shape, kind and device, and shared: do not write into it.

    Args:
        height, width: of the grid, in tokens.
        scan: "continuous" or "cross".
        device: of the result.

    Raises:
        ValueError: for a side below 1 or an unknown kind of scan.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a grid of {height} x {width} tokens is empty; both sides must be at least 1")
    check_known("scan", scan, ("continuous", "cross"))
    return _cached_paths(height, width, scan, torch.device(device))


def inverse_paths(paths: Tensor) -> Tensor:
    """Return the inverse permutations: inverse[k, paths[k, t]] = t, (g, l) like paths."""
    return paths.argsort(1)
