"""lamamba info: what a network is and costs, without allocating it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamamba.cli.parse import parse
from lamamba.config import PRESETS, UNetConfig, unknown_name

DESCRIPTION = """Print parameters, multiply-adds by kind, and activation memory of a network.

  lamamba info xl --image-size 512
  lamamba info xl --image-size 256 --state-size 16        as in the paper's tables
  lamamba info runs/digits                                a trained one

Nothing is allocated: the counts come from a run on PyTorch's meta device."""


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A preset (s, b, l, xl), or a run folder or saved model."""
    image_size: int | None = None
    """Side of the image in pixels (256), 8 times the latent's; only for presets."""
    state_size: int | None = None
    """Memory of the scan in numbers per channel (1); only for presets."""
    num_classes: int | None = None
    """Class labels (1000); 0: unconditional. Only for presets."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str]) -> None:
    chosen = parse(InfoArguments, arguments, "info", DESCRIPTION)
    config = _find_config(chosen)

    from lamamba.benchmarking.flops import count

    cost = count(config)
    if chosen.json:
        print(json.dumps({"config": config.to_dict(), **asdict(cost), "paper_total": cost.paper_total}, indent=2))
        return
    (height, width), (rows, columns) = config.input_size, config.token_grid
    print(f"""LaMamba-Diff, width {config.width}, state size {config.state_size}, {config.num_classes} classes
input                       {config.in_channels} x {height} x {width}, {rows} x {columns} tokens
parameters                  {cost.parameters / 1e6:.2f} M

for one image and one forward pass:
  matrix products and convolutions   {cost.matrix / 1e9:.2f} G multiply-adds
  scan                               {cost.scan / 1e9:.2f} G operations
  layer norm                         {cost.layer_norm / 1e9:.2f} G operations
  total, the paper's way             {cost.paper_total / 1e9:.2f} G
  activations kept for training      {cost.activation_bytes / 2**20:.0f} MiB (float32)""")


def _find_config(chosen: InfoArguments) -> UNetConfig:
    given = {name: getattr(chosen, name) for name in ("image_size", "state_size", "num_classes")}
    given = {name: value for name, value in given.items() if value is not None}
    if chosen.model in PRESETS:
        return UNetConfig.preset(chosen.model, **given)
    path = Path(chosen.model)
    if not path.exists():
        raise unknown_name("preset or folder", chosen.model, PRESETS)
    if given:
        raise ValueError(f"{chosen.model} is a saved model and has its own sizes; leave {', '.join(given)} out")
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from error
    values = values.get("architecture", values)
    return UNetConfig.from_dict({key: value for key, value in values.items() if not key.startswith("_")})
