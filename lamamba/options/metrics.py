"""What figures depend on besides images and feature network."""

from __future__ import annotations

from typing import Annotated

from lamamba.options.base import Ge, Positive, options


@options
class MetricOptions:
    """Neighbours, subsets and splits of the figures; part of the protocol."""

    neighbours: Positive = 3
    """k of precision and recall."""
    density_neighbours: Positive = 5
    """k of density and coverage."""
    reference_rows: Annotated[int, Ge(2)] = 10_000
    """Reference images for precision, recall, density, coverage and KID, spread evenly (ADM: 10,000)."""
    kernel_subset: Annotated[int, Ge(2)] = 1000
    """Images in a subset of the kernel distance."""
    kernel_subsets: Positive = 100
    """Number of subsets."""
    kernel_seed: Annotated[int, Ge(0)] = 0
    """Seed that draws the subsets."""
    split: Positive = 5000
    """Images in a split of the Inception Score."""
