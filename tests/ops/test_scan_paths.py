"""Scan paths are permutations of the grid, continuous, in reversed pairs, and cached."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamamba.ops import inverse_paths, scan_paths


def test_continuous_paths_of_a_small_grid_by_hand():
    """Tokens 0 1 2 / 3 4 5 / 6 7 8 / 9 10 11, in the order of the paper's Figure 4."""
    rows = [0, 1, 2, 5, 4, 3, 6, 7, 8, 11, 10, 9]
    columns = [9, 6, 3, 0, 1, 4, 7, 10, 11, 8, 5, 2]
    assert scan_paths(4, 3).tolist() == [rows, rows[::-1], columns, columns[::-1]]


def test_the_official_rule_on_an_even_square():
    """There the rule read literally gives the same: 'rows from the bottom, the first row left to right' and so on."""
    side = 6
    tokens = torch.arange(side * side).view(side, side)
    paths = [[], [], [], []]
    for i in range(side):
        paths[0] += (tokens[i] if i % 2 == 0 else tokens[i].flip(0)).tolist()
        paths[1] += (tokens[side - 1 - i] if i % 2 == 0 else tokens[side - 1 - i].flip(0)).tolist()
        paths[2] += (tokens[:, i].flip(0) if i % 2 == 0 else tokens[:, i]).tolist()
        paths[3] += (tokens[:, side - 1 - i].flip(0) if i % 2 == 0 else tokens[:, side - 1 - i]).tolist()
    assert scan_paths(side, side).tolist() == paths


def test_cross_paths_of_a_small_grid_by_hand():
    assert scan_paths(2, 3, "cross").tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0],
    ]


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 13), width=st.integers(1, 13), scan=st.sampled_from(["continuous", "cross"]))
def test_any_grid(height, width, scan):
    paths = scan_paths(height, width, scan)
    tokens = torch.arange(height * width)
    assert torch.equal(paths.sort().values, tokens.expand(4, -1))
    pairs = ((0, 1), (2, 3)) if scan == "continuous" else ((0, 2), (1, 3))
    assert all(torch.equal(paths[there], paths[back].flip(0)) for there, back in pairs)
    assert torch.equal(paths.gather(1, inverse_paths(paths)), tokens.expand(4, -1))
    if scan == "continuous":
        row, column = paths // width, paths % width
        assert bool(((row.diff().abs() + column.diff().abs()) == 1).all())


def test_paths_are_cached():
    assert scan_paths(8, 12) is scan_paths(8, 12)
    with torch.device("meta"):
        assert scan_paths(9, 13).device.type == "cpu"


def test_invalid_grids_raise():
    with pytest.raises(ValueError, match="0 x 3"):
        scan_paths(0, 3)
    with pytest.raises(ValueError, match="did you mean 'cross'"):
        scan_paths(4, 4, "cros")
