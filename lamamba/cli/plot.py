"""Draw loss, gradient norm and images per second of runs over their steps, into one PNG.

  lamamba plot runs/digits
  lamamba plot runs/a runs/b runs/c --out compared.png

Thin lines are what was logged, thick ones a running mean; dots are the loss on held-out images. Quick scores, where
there are any (--score.every of lamamba train), have a panel of their own."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.plot import PlotOptions


def main(arguments: list[str]) -> None:
    chosen = parse(PlotOptions, arguments, "plot", __doc__)

    from lamamba.api.plot import plot

    print(plot(chosen))
