"""lamamba.encode: images to latents of an autoencoder on disk, once."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.encode import encode as encode_shards
from lamamba.data.encode import excluded_at_start, make_plan
from lamamba.data.latents import Index, Plan
from lamamba.data.manifest import excluded_files
from lamamba.data.sources import open_source
from lamamba.options.base import verb
from lamamba.options.encode import EncodeOptions
from lamamba.utils.distributed import is_rank_zero, launched_rank, local_device
from lamamba.utils.progress import ProgressOption, reporting
from lamamba.utils.text import counted

logger = logging.getLogger("lamamba.api")


@dataclass(frozen=True)
class EncodeResult:
    """A folder of latents, complete and verified."""

    folder: Path
    index: Index = field(repr=False)
    """The plan, and files, labels and hash of each shard."""

    @property
    def num_excluded(self) -> int:
        """Images that could not be decoded, beyond those known from the manifest."""
        return sum(len(shard.excluded) for shard in self.index.shards)

    @property
    def num_images(self) -> int:
        return self.index.plan.images - self.num_excluded

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.index.shards)

    def __str__(self) -> str:
        bad = f", {self.num_excluded} bad images excluded" if self.num_excluded else ""
        return (
            f"done: {self.folder}, {counted(self.num_images, 'image')} in "
            f"{counted(len(self.index.shards), 'verified shard')}, {self.num_bytes / 2**20:,.1f} MiB{bad}\n"
            f"train on it: lamamba train RECIPE --data.source {self.folder} "
            f"--data.image-size {self.index.plan.image_size}"
        )


@verb
def encode(options: EncodeOptions, *, progress: ProgressOption = "auto") -> EncodeResult:
    """Encode images with a frozen autoencoder, together with any other processes that do the same.

    Where an earlier call was stopped, the same call goes on.

    Raises:
        FileExistsError: when the folder holds something else.
        ValueError: when it holds latents made otherwise, with the differences; when too many images are bad, with their
            names; when sizes do not fit.
        OSError: when the disk is full or broken; finished shards stay.
    """
    source = open_source(options.source)
    excluded, note = excluded_files(source, options.manifest)
    if note and is_rank_zero():
        logger.warning(note)
    newly_excluded: set[str] = set()
    if (before := excluded_at_start(options.out)) is not None:                  # no image changes its shard
        excluded, newly_excluded = before, set(excluded) - set(before)
    autoencoder = Autoencoder(options.autoencoder, local_device(options.device), getattr(torch, options.dtype))
    plan = make_plan(
        source, autoencoder, options.image_size, excluded=excluded, mirror=options.mirror, storage=options.storage,
        batch_size=options.batch_size, threads=options.threads, shard_size=options.shard_size,
    )
    if is_rank_zero():
        _announce(options.out, plan, autoencoder, len(newly_excluded))
    with reporting(progress if is_rank_zero() else None) as report:
        index = encode_shards(
            source, autoencoder, options.out, plan, newly_excluded=newly_excluded,
            max_bad_images=options.max_bad_images, rank=launched_rank(), report=report,
        )
    return EncodeResult(options.out, index)


def _announce(folder: Path, plan: Plan, autoencoder: Autoencoder, num_newly_excluded: int) -> None:
    views, shape = "with" if plan.views == 2 else "without", " x ".join(map(str, plan.shape))
    logger.info(
        "%s: %s images of %s %s mirror images, %d excluded by the manifest, %d shards", folder, f"{plan.images:,}",
        plan.source, views, len(plan.excluded or ()), plan.num_shards,
    )
    logger.info("autoencoder %s, latents %s", autoencoder, shape)
    if num_newly_excluded:
        logger.info(
            "%d files came into the manifest after %s was begun: they are excluded from their shards, the others stay",
            num_newly_excluded, folder,
        )
