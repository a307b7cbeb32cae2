"""lamamba.info: parameters, multiply-adds and memory of a network, without allocating it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamamba.benchmarking.comparison import Comparison, compare_systems
from lamamba.benchmarking.flops import Cost, count
from lamamba.config import PRESETS, UNetConfig, unknown_name
from lamamba.models.weights import read_config
from lamamba.options.base import verb
from lamamba.options.info import InfoOptions
from lamamba.pretrained import SHIPPED_MODELS, is_shipped, shipped_model
from lamamba.runs.folder import RunFolder
from lamamba.utils.text import counted


@dataclass(frozen=True)
class InfoResult:
    """What a network is and costs, for one image and one forward pass."""

    config: UNetConfig
    cost: Cost
    comparison: Comparison | None = None
    """The paper's table of systems, where it was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        table = {"comparison": self.comparison.to_dict()} if self.comparison else {}
        return {"config": self.config.to_dict(), **asdict(self.cost), "paper_total": self.cost.paper_total, **table}

    def __str__(self) -> str:
        if self.comparison:
            return str(self.comparison)
        config, cost = self.config, self.cost
        (height, width), (rows, columns) = config.input_size, config.token_grid
        return f"""\
LaMamba-Diff, width {config.width}, state size {config.state_size}, {counted(config.num_classes, 'class')}
input                       {config.in_channels} x {height} x {width}, {rows} x {columns} tokens
parameters                  {cost.parameters / 1e6:.2f} M

for one image and one forward pass:
  matrix products and convolutions   {cost.matrix / 1e9:.2f} G multiply-adds
  scan                               {cost.scan / 1e9:.2f} G operations
  layer norm                         {cost.layer_norm / 1e9:.2f} G operations
  total, the paper's way             {cost.paper_total / 1e9:.2f} G
  activations kept for training      {cost.activation_bytes / 2**20:.0f} MiB (float32)"""


@verb
def info(options: InfoOptions) -> InfoResult:
    """Count a network on PyTorch's meta device: nothing is allocated.

    Raises:
        FileNotFoundError: when a folder holds no model.
        ValueError: for an unknown preset or folder, sizes that do not fit, or a damaged config.json.
    """
    config = _find_config(options)
    name = f"LaMamba-Diff-{options.model.upper()}" if options.model in PRESETS else Path(options.model).name
    cost = count(config)
    return InfoResult(config, cost, compare_systems(name, config, cost) if options.compare else None)


def _find_config(options: InfoOptions) -> UNetConfig:
    given = {name: getattr(options, name) for name in ("image_size", "state_size", "num_classes")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.model in PRESETS:
        return UNetConfig.preset(options.model, **given)
    path = shipped_model(options.model) if is_shipped(options.model) else Path(options.model)
    if not path.exists():
        raise unknown_name("preset or folder", options.model, [*PRESETS, *SHIPPED_MODELS])
    if given:
        raise ValueError(f"{options.model} is a saved model and has its own sizes; leave {', '.join(given)} out")
    places = (path, path / "ema", path / "unet")                                # model or run, checkpoint, pipeline
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"{path} holds no model: there is no config.json in it")
    return RunFolder(folder).architecture() if (folder / "checkpoints").is_dir() else read_config(folder)
