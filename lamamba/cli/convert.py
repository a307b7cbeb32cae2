"""Convert an official LaMamba-Diff checkpoint (.pt) to a folder in our format, or a folder back to .pt.

  lamamba convert lamamba-xl.pt models/xl               reads the EMA weights; nothing in the file is executed
  lamamba convert models/xl back.pt                     for the official code's strict loader

The result samples with: lamamba sample models/xl --autoencoder stabilityai/sd-vae-ft-ema --classes 207"""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.convert import ConvertOptions


def main(arguments: list[str]) -> None:
    chosen = parse(ConvertOptions, arguments, "convert", __doc__)

    from lamamba.api.convert import convert

    print(convert(chosen))
