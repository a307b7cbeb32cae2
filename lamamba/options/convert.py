"""Options of `lamamba.convert`."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from lamamba.options.base import FilePath, options


@options
class ConvertOptions:
    """What to convert; the direction follows from the source."""

    source: Annotated[FilePath, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """An official .pt file, or a folder in our format."""
    target: Annotated[FilePath, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder or .pt file to write; it must not exist yet."""
    weights: Literal["ema", "model"] | None = None
    """Which weights of an official checkpoint; by default EMA where it has them."""
