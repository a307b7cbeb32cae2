"""Make a diffusers pipeline of a trained network: weights, scheduler, autoencoder, names, a model card.

  lamamba export runs/digits exported/digits
  lamamba export models/xl exported/xl --autoencoder stabilityai/sd-vae-ft-ema --labels imagenet

The folder loads with LaMambaPipeline.from_pretrained, samples with lamamba sample, and can be pushed to a hub. Its
README.md is a model card with the configuration, what is known of the training, and a grid of samples."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.export import ExportOptions


def main(arguments: list[str]) -> None:
    chosen = parse(ExportOptions, arguments, "export", __doc__)

    from lamamba.api.export import export

    print(export(chosen))
