"""Print parameters, multiply-adds by kind, and activation memory of a network.

  lamamba info xl --image-size 512
  lamamba info xl --image-size 256 --state-size 16        as in the paper's tables
  lamamba info runs/digits                                a trained one
  lamamba info --compare --image-size 256                 the paper's table of systems, counted

Nothing is allocated: the counts come from a run on PyTorch's meta device."""

from __future__ import annotations

import json

from lamamba.cli.parse import parse
from lamamba.options.base import options
from lamamba.options.info import InfoOptions


@options
class InfoArguments(InfoOptions):
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str]) -> None:
    chosen = parse(InfoArguments, arguments, "info", __doc__)

    from lamamba.api.info import info

    result = info(chosen)
    print(json.dumps(result.to_dict(), indent=2) if chosen.json else result)
