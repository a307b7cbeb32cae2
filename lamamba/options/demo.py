"""Options of `lamamba.demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lamamba.options.base import FilePath, Ge, Positive, options

SHOWN_PER_DIGIT = 10


@options
class DemoOptions:
    """A training on handwritten digits, and the samples that are evaluated."""

    out: FilePath = Path("demo")
    """Folder for pictures, report and run. A run that was stopped there is resumed."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the training."""
    steps: Positive | None = None
    """Training steps; by default the recipe's. Fewer are quicker and worse."""
    per_digit: Annotated[int, Ge(SHOWN_PER_DIGIT)] = 50
    """Samples of each digit that are classified; the first ten are shown."""
