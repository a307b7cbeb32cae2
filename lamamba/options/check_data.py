"""Options of `lamamba.check_data`."""

from __future__ import annotations

from typing import Annotated

import tyro

from lamamba.options.base import FilePath, Name, Positive, Threads, options


@options
class CheckDataOptions:
    """What to check."""

    source: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder, tars, datasets:ID, or latents."""
    manifest: FilePath | None = None
    """Where to write what was found; by default SOURCE/lamamba-manifest.json (beside tars, by their name; here, for
    a hub id)."""
    workers: Threads | None = None
    """Processes that decode; by default one per core."""
    min_side: Positive = 2
    """Images with fewer pixels on their short side are bad."""
    strict: bool = False
    """CMYK, 16-bit and transparent files are bad, too, instead of being converted."""

    def __post_init__(self) -> None:
        if self.manifest is not None and self.manifest.suffix != ".json":
            raise ValueError(f"manifest={self.manifest}: it is a .json file")
