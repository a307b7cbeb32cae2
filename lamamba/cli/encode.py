"""lamamba encode: images become latents on disk, once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamamba.cli.parse import parse

DESCRIPTION = """Encode images with a frozen autoencoder, once, for training in its latent space.

  lamamba encode imagenet/train --autoencoder stabilityai/sd-vae-ft-ema --image-size 256 --out latents/
  torchrun --nproc-per-node 8 -m lamamba encode imagenet/train ... --out latents/        one process per GPU
  lamamba train xl_256 --data.source latents/ --data.image-size 256                      then train on them

SOURCE is anything that lamamba data check takes; the bad files in its manifest are left out. Images are cropped as ADM
and DiT do. Of each image and of its mirror image the mean and the standard deviation of the posterior are kept, so that
training draws a fresh latent on every visit.

Any number of processes may work on one folder, started by torchrun or by hand, on one machine or on several: each
claims shards, and a shard holds the same bytes whoever makes it. When some are killed the others take over; when all
are, the same command goes on where they were. At the end every shard is verified."""


@dataclass(frozen=True, kw_only=True)
class EncodeArguments:
    source: Annotated[str, tyro.conf.Positional]
    """Images: a folder, tars, or datasets:ID."""
    autoencoder: str
    """Of diffusers (AutoencoderKL, AutoencoderDC, AutoencoderTiny): a folder or a hub id. Only safetensors are read."""
    image_size: int = 256
    """Side in pixels of the square images."""
    out: Path = Path("latents")
    """Folder for the shards."""
    manifest: Path | None = None
    """Of lamamba data check; by default the one beside the source, where there is one."""
    max_bad_images: int = 0
    """Bad files beyond the manifest's to bear before encoding stops with their names."""
    mirror: bool = True
    """Encode mirror images, too: twice the time and space; training can mirror only then."""
    batch: int = 16
    """Images that the autoencoder sees at once. Part of the result: other batches round otherwise."""
    threads: int = 1
    """On a CPU, cores for each process. Part of the result, too: to use all cores, start more processes instead."""
    shard_size: int = 1024
    """Images in a file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which the autoencoder works."""
    storage: Literal["float16", "float32"] = "float16"
    """In which latents are stored. float16 is wrong by at most 0.05 %, far less than 8-bit pixels are, for half the
    space."""
    device: str = "auto"
    """"auto" (a GPU where there is one; under torchrun each process its own), or a PyTorch device."""


def main(arguments: list[str]) -> None:
    chosen = parse(EncodeArguments, arguments, "encode", DESCRIPTION)
    for name in ("image_size", "batch", "threads", "shard_size"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(chosen, name)} must be at least 1")

    from lamamba.data.manifest import known_bad
    from lamamba.data.sources import open_source
    from lamamba.utils.bars import WorkBar

    source = open_source(chosen.source)
    left_out, note = known_bad(source, chosen.manifest)
    rank, is_first = int(os.environ.get("RANK", "0")), os.environ.get("RANK", "0") == "0"
    if note and is_first:
        print(f"warning: {note}", flush=True)

    import torch

    from lamamba.data.autoencoder import Autoencoder
    from lamamba.data.encode import Progress, begun_without, encode, make_plan
    from lamamba.utils.distributed import local_device

    foreseen: set[str] = set()
    if (before := begun_without(chosen.out)) is not None:                       # the same numbers for the same images
        left_out, foreseen = before, set(left_out) - set(before)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True       # the same bits every time
    autoencoder = Autoencoder(chosen.autoencoder, local_device(chosen.device), getattr(torch, chosen.dtype))
    plan = make_plan(
        source, autoencoder, chosen.image_size, left_out=left_out, mirror=chosen.mirror, storage=chosen.storage,
        batch_size=chosen.batch, threads=chosen.threads, shard_size=chosen.shard_size,
    )
    if is_first:
        views = "with mirror images" if chosen.mirror else "without mirror images"
        shape = " x ".join(map(str, plan.shape))
        print(f"{chosen.out}: {plan.images:,} images of {source.name} {views}, {len(left_out)} left out by the "
              f"manifest, {plan.num_shards} shards\nautoencoder {autoencoder}, latents {shape}", flush=True)
        if foreseen:
            print(f"{len(foreseen)} files came into the manifest after {chosen.out} was begun: they are left out of "
                  "their shards, the others stay where they are", flush=True)

    phase = ""
    with WorkBar("encoding", plan.images) as bar:

        def tell(progress: Progress) -> None:
            nonlocal phase
            if not is_first:
                return
            if progress.phase == "verifying":
                if phase != "verifying":
                    bar.begin("verifying", progress.num_shards, "shards")
                bar(progress.shards)
            else:
                if not phase:
                    bar.skip(progress.images)
                bar(progress.images, "waiting for other processes" if progress.phase == "waiting" else "")
            phase = progress.phase

        index = encode(
            source, autoencoder, chosen.out, plan, left_out=left_out, foreseen=foreseen,
            max_bad_images=chosen.max_bad_images, rank=rank, on_progress=tell,
        )
    if is_first:
        missing = sum(len(shard.left_out) for shard in index.shards)
        size = sum(shard.bytes for shard in index.shards)
        print(f"done: {chosen.out}, {plan.images - missing:,} images in {plan.num_shards} verified shards, "
              f"{size / 2**20:,.1f} MiB{f', {missing} bad images left out' if missing else ''}\n"
              f"train on it: lamamba train RECIPE --data.source {chosen.out} --data.image-size {chosen.image_size}")
