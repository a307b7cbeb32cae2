"""Train LaMamba-Diff on 1,797 real handwritten digits, then sample digits and evaluate them.

Writes into the folder: digits.png (a 10 x 10 grid, one row per digit), real.png (real digits, to compare), loss.png,
one-step.png (by the flow map of the package, one evaluation of the network for each image), report.md, report.json, and
run/, which lamamba sample and lamamba train can go on with."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.demo import DemoOptions


def main(arguments: list[str]) -> None:
    options = parse(DemoOptions, arguments, "demo", __doc__)

    from lamamba.api.demo import demo

    print(demo(options))
