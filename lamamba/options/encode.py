"""Options of `lamamba.encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamamba.options.base import FilePath, Ge, Name, Positive, Threads, options


@options
class EncodeOptions:
    """Which images to encode, with which autoencoder."""

    source: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Images: a folder, tars, or datasets:ID."""
    autoencoder: Name
    """A diffusers autoencoder (AutoencoderKL, AutoencoderDC, AutoencoderTiny): a folder or a hub id. Only safetensors
    are read."""
    image_size: Positive = 256
    """Side in pixels of the square images."""
    out: FilePath = Path("latents")
    """Folder for the shards."""
    manifest: FilePath | None = None
    """The manifest of lamamba data check; by default the one beside the source, where there is one."""
    max_bad_images: Annotated[int, Ge(0)] = 0
    """Bad files beyond the manifest's to tolerate before encoding stops with their names."""
    mirror: bool = True
    """Encode mirror images, too: twice the time and space; training can mirror only then."""
    batch_size: Annotated[Positive, tyro.conf.arg(aliases=["--batch"])] = 16
    """Images per batch of the autoencoder. Part of the result: other batches round otherwise."""
    threads: Threads = 1
    """On a CPU, cores for each process. Part of the result, too: to use all cores, start more processes instead."""
    shard_size: Positive = 1024
    """Images in a file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the autoencoder's arithmetic."""
    storage: Literal["float16", "float32"] = "float16"
    """Data type of the stored latents. float16 is wrong by at most 0.05 %, far less than 8-bit pixels are, for half the
    space."""
    device: str = "auto"
    """"auto" (a GPU where there is one; under torchrun each process its own), or a PyTorch device."""
