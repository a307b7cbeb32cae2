"""Check data before training on it: lamamba data check SOURCE [options].

  lamamba data check photos/                      a folder: one subfolder per class, or images side by side
  lamamba data check 'shards/train-{000..146}.tar'   WebDataset tars, or a folder of them
  lamamba data check datasets:owner/name@train    a Hugging Face data set by id or folder (@SPLIT: train by default)
  lamamba data check latents/                     latents of lamamba encode: every shard is compared with its hash

Every image is decoded, by several processes. Bad files are named by kind and written into a manifest
(SOURCE/lamamba-manifest.json), by which lamamba train and lamamba encode leave them out:
  empty, not an image, truncated, damaged, unreadable (the disk's fault); too small (below --min-side), too narrow (over
  64 times as long as wide), decompression bomb (over 179 million pixels), 32-bit (its white is unknown)

Some files are good after a conversion, and only named; with --strict they are bad, too:
  CMYK     R = (1 - C)(1 - K) and so on, without a colour profile
  16-bit   grey levels divided by 257, of colours the upper byte"""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.config import unknown_name
from lamamba.options.check_data import CheckDataOptions


def main(arguments: list[str]) -> None:
    task, *rest = arguments or ["--help"]
    if task not in ("check", "-h", "--help"):
        raise unknown_name("task of lamamba data", task, ["check"])
    options = parse(CheckDataOptions, rest if task == "check" else arguments, "data check", __doc__)

    from lamamba.api.check_data import check_data

    print(check_data(options))
