"""Parity files of the official code, and small random networks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lamamba import LaMambaUNet, UNetConfig
from lamamba.models.official import derive_config
from lamamba.ops import native
from lamamba.runs.metadata import ModelMetadata

PARITY = Path(__file__).parent / "parity"
BACKENDS = [*(f"cpu/{name}" for name in native.INSTRUCTION_SETS), "torch", "reference"]
"""Of the scan, on CPUs; the compiled one once for each of its instruction sets."""
FILES = ("cond_state1", "cond_state16_rgb", "patch2", "uncond_cross_scan")


@dataclass
class ParityCase:
    """A parity file: the official weights, an input, and the official outputs and gradients."""

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    config: UNetConfig

    @property
    def labels(self) -> Tensor | None:
        return self.tensors["in.y"] if self.config.num_classes else None


def load_case(name: str) -> ParityCase:
    with safe_open(PARITY / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): tensor for key, tensor in tensors.items() if key.startswith("weights.")}
    scan = "continuous" if metadata.get("continuous", True) else "cross"
    return ParityCase(tensors, weights, derive_config(weights, scan))


def largest_difference(images, others) -> int:
    """Between two arrays of uint8, in grey levels."""
    return int(np.abs(np.asarray(images).astype(int) - np.asarray(others).astype(int)).max())


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest error over largest value."""
    return float((result.detach() - expected).abs().max() / expected.abs().max())


TINY = dict(
    width=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1,
    removed_blocks=(
        "bottleneck", *(f"encoder.{stage}.0" for stage in (1, 2, 3)), "decoder.3.1",
        *(f"decoder.{stage}.{block}" for stage in (0, 1, 2) for block in (0, 1)),
    ),
)
"""Fields of a network with one block in the first and last stages and none in the others, for the time of a step."""


def small_config(**changes) -> UNetConfig:
    sizes = dict(width=16, num_heads=2, depths=(2, 1, 1, 1), bottleneck_depth=1, window_size=4)
    fields = dict(**sizes, grid=(8, 8), num_classes=3)
    return UNetConfig(**{**fields, **changes})


def two_blocks(**changes) -> UNetConfig:
    """All blocks removed but one in the first stage and one in the last."""
    removed = ("bottleneck", "encoder.0.0", "encoder.1.0", "encoder.2.0", "encoder.3.0",
               *(f"decoder.{stage}.{i}" for stage in range(4) for i in (0, 1)))
    return small_config(**changes, removed_blocks=removed)


def random_network(config: UNetConfig, seed: int = 0) -> LaMambaUNet:
    """A network without zero parameters, so that every one has an effect on the output."""
    torch.manual_seed(seed)
    model = LaMambaUNet(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def grey_network(seed: int = 0, **changes) -> LaMambaUNet:
    """A random network of `two_blocks` for grey images of 8 x 8 pixels, a flow's unless said otherwise."""
    return random_network(two_blocks(**{"in_channels": 1, "objective": "flow", "width": 8, **changes}), seed)


def save_model(folder: Path, network: LaMambaUNet, **metadata: Any) -> Path:
    """Save a network with its sampling.json: of pixels and without names of classes unless said otherwise."""
    network.save_pretrained(folder)
    config = network.architecture
    values = {"objective": config.objective, "image_size": config.input_size[0], **metadata}
    ModelMetadata(**values).save(folder / "sampling.json")
    return folder


def random_inputs(config: UNetConfig, batch: int = 2, seed: int = 1, grid=None):
    generator = torch.Generator().manual_seed(seed)
    grid = grid or config.token_grid
    size = (grid[0] * config.patch_size, grid[1] * config.patch_size)
    x = torch.randn(batch, config.in_channels, *size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    y = torch.randint(0, config.num_classes + 1, (batch,), generator=generator) if config.num_classes else None
    return x, t, y
