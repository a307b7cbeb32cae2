"""Sample images from a trained network.

  lamamba sample runs/digits --classes 3,7 --seed 0 --out grid.png             one row per class, one seed per image
  lamamba sample --like grid.png --steps 10 --out again.png                    as that picture was made, but for ...
  lamamba sample runs/digits --out denoising.gif                               a film of the way from noise (or .mp4)
  lamamba sample runs/digits --interpolate seeds:3:7 --classes 2 --out path.png      (or classes:3:8; or a film)
  lamamba sample runs/xl --num 50000 --random-labels --format npz --out samples/     by any number of processes:
  torchrun --nproc-per-node 8 -m lamamba sample runs/xl -n 50000 --random-labels --format npz --out samples/

MODEL is a run folder (its newest checkpoint's averaged weights), a checkpoint, a saved model or an exported pipeline;
without it, the small digits model that ships with the package. Image k is made from seed + k, whatever the batch size
and the process. Every PNG carries its settings. A folder of images is continued by the same command."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from lamamba.cli.parse import parse, show
from lamamba.options.base import FilePath, options
from lamamba.options.sample_folder import FolderOptions, SampleFolderOptions
from lamamba.options.sampling import PICTURE_SUFFIXES, SampleOptions

T = TypeVar("T")


@options
class SampleArguments(FolderOptions, SampleOptions):
    """What the command line takes: the options of a picture and of a folder."""

    out: FilePath | None = None
    """A picture (.png), a film of the denoising or the interpolation (.gif, .mp4), or a folder of images. By default
    samples.png, or samples/ with --balanced or --random-labels."""

    @property
    def is_folder(self) -> bool:
        """Whether a folder of images is requested."""
        has_no_suffix = self.out is not None and not self.out.suffix
        return bool(self.balanced or self.random_labels or self.format or has_no_suffix)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_folder and self.out is not None and self.out.suffix.lower() in PICTURE_SUFFIXES:
            raise ValueError(f"many images go into a folder, and --out {self.out} is a file: give a folder's name")
        if self.is_folder and self.interpolate:
            raise ValueError("--interpolate makes a picture or a film: give --out with .png, .gif or .mp4")


def main(arguments: list[str]) -> None:
    chosen = parse(SampleArguments, arguments, "sample", __doc__)
    if chosen.is_folder:
        from lamamba.api.sample_folder import sample_folder

        show(sample_folder(_select(SampleFolderOptions, chosen, out=chosen.out or Path("samples"))))
    else:
        from lamamba.api.sample import sample

        print(sample(_select(SampleOptions, chosen, out=chosen.out or Path("samples.png"))))


def _select(cls: type[T], chosen: Any, **changes: Any) -> T:
    """The options of another class, from those of the same names."""
    return cls(**{entry.name: getattr(chosen, entry.name) for entry in fields(cls)} | changes)  # type: ignore[arg-type]
