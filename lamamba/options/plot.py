"""Options of `lamamba.plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from lamamba.options.base import FilePath, Ge, Le, options


@options
class PlotOptions:
    """Which runs to draw, and where."""

    runs: Annotated[tuple[FilePath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders (or their metrics.jsonl)."""
    out: FilePath = Path("runs.png")
    """The picture."""
    smooth: Annotated[float, Ge(0), Le(1)] = 0.02
    """Share of a run that the running mean spans; 0: none."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("name at least one run, such as runs/digits")
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"out={self.out}: the picture is a .png")
