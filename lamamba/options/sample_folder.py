"""Options of `lamamba.sample_folder`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lamamba.options.base import FilePath, Positive, Threads, options
from lamamba.options.sampling import SamplerOptions


@options
class FolderOptions:
    """Labels and files of a folder of images."""

    balanced: bool = False
    """A folder of images: the classes in turn."""
    random_labels: bool = False
    """A folder of images: each with a class drawn from its own seed, as for the published scores."""
    format: Literal["png", "npz", "both"] | None = None
    """For a folder of images: a PNG each (the default), one uint8 npz (arr_0: N x H x W x 3, arr_1: labels), or both.
    The npz alone takes twice its size while it is put together."""
    threads: Threads | None = None
    """Cores for each process of a folder of images, on a CPU; by default all (under torchrun, one)."""

    def __post_init__(self) -> None:
        if self.balanced and self.random_labels:
            raise ValueError("balanced and random_labels exclude each other: choose one")


@options
class SampleFolderOptions(FolderOptions, SamplerOptions):
    """How many images of which classes, in which files."""

    out: FilePath = Path("samples")
    """Folder for the images; one that was begun by the same options goes on."""
    num: Positive | None = None
    """Images in all; needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num is None:
            raise ValueError("say how many images the folder shall hold: num=50000")
