"""Encode images with a frozen autoencoder, once, for training in its latent space.

  lamamba encode imagenet/train --autoencoder stabilityai/sd-vae-ft-ema --image-size 256 --out latents/
  torchrun --nproc-per-node 8 -m lamamba encode imagenet/train ... --out latents/        one process per GPU
  lamamba train xl_256 --data.source latents/ --data.image-size 256                      then train on them

SOURCE is anything that lamamba data check takes; the bad files in its manifest are excluded. Images are cropped as ADM
and DiT do. Of each image and of its mirror image the mean and the standard deviation of the posterior are kept, so that
training draws a fresh latent at every step.

Any number of processes may work on one folder, started by torchrun or by hand, on one machine or on several: each locks
shards, and a shard holds the same bytes whoever makes it. When some are killed the others take over; when all are, the
same command goes on where they were. At the end every shard is verified."""

from __future__ import annotations

from lamamba.cli.parse import parse, show
from lamamba.options.encode import EncodeOptions


def main(arguments: list[str]) -> None:
    options = parse(EncodeOptions, arguments, "encode", __doc__)

    from lamamba.api.encode import encode

    show(encode(options))
