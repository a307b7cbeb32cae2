"""What figures depend on beside images and feature network. No torch here, for the command line's help."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    """What the figures depend on beside samples, reference and feature network; part of the protocol."""

    neighbours: int = 3
    """k of precision and recall."""
    density_neighbours: int = 5
    """k of density and coverage."""
    reference_rows: int = 10_000
    """Reference images whose neighbours are looked at, spread evenly (ADM: 10,000)."""
    kernel_subset: int = 1000
    """Images in a subset of the kernel distance."""
    kernel_subsets: int = 100
    """How many subsets."""
    kernel_seed: int = 0
    """Of the subsets."""
    split: int = 5000
    """Images in a split of the Inception Score."""

    def check(self) -> None:
        """Raises ValueError for numbers that cannot be."""
        for name, value in asdict(self).items():
            if value < (0 if name == "kernel_seed" else 1):
                raise ValueError(f"{name}={value} is too small")
