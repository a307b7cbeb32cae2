"""Memory of a training step, counted on fake tensors: nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lamamba.benchmarking.flops import address, saved_storages
from lamamba.benchmarking.private_torch import FakeTensorMode
from lamamba.config import UNetConfig
from lamamba.models.blocks import LaMambaBlock
from lamamba.models.unet import GEOMETRY_SCALES, LaMambaUNet

FLOAT = 4
MOMENTS = 2
"""Of AdamW, per parameter."""
ALLOCATOR = 1.08
"""Overhead of allocators, measured on CPUs (tests hold the whole estimate to 15 %)."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the peak of a step."""

    state: int
    """Weights, EMA copies and AdamW's moments."""
    peak: int
    """The state, and the peak of activations and gradients during the backward pass."""

    @property
    def step(self) -> int:
        """Bytes besides the state."""
        return self.peak - self.state


def training_memory(
    config: UNetConfig, batch_size: int, *, num_averages: int = 1, processes: int = 1, sharded: bool = False,
    bfloat16: bool = False, checkpoint_activations: bool = False, accumulates: bool = False,
    lora_parameters: int | None = None,
) -> TrainingMemory:
    """Estimate the memory of a training step on one device.

    Args:
        config: of the network.
        batch_size: images of one forward pass on this device.
        num_averages: EMA copies of the weights.
        processes: among which a sharded state is split.
        sharded: parameters, gradients, EMA copies and moments are split among the processes.
        bfloat16: autocast to bfloat16.
        checkpoint_activations: blocks save their inputs only.
        accumulates: several forward passes per step, so that gradients exist from the start.
        lora_parameters: of a LoRA, which alone is trained and averaged then.
    """
    parts = processes if sharded else 1
    events, transient, parameters, largest_block = _run(
        config, batch_size, bfloat16, checkpoint_activations, bfloat16_blocks=sharded and bfloat16
    )
    weights = FLOAT * parameters
    state = weights * (1 + num_averages + MOMENTS) // parts
    kept = sum(saved for saved, _ in events)
    gradients = weights if accumulates else 0
    if lora_parameters is not None:
        state, gradients = weights + FLOAT * lora_parameters * (1 + num_averages + MOMENTS), FLOAT * lora_parameters
        events = [(saved, 0) for saved, _ in events]
    peak = kept + gradients // parts
    for saved, gradient in reversed(events):
        if not accumulates:
            gradients += gradient
        peak = max(peak, kept + gradients // parts)
        kept -= saved
    unsharded = 0
    if sharded:                                                                 # one block in use, one being gathered
        unsharded = 2 * largest_block * (FLOAT // 2 if bfloat16 else FLOAT)
    return TrainingMemory(state, round(ALLOCATOR * (state + peak + transient + unsharded)))


def _run(
    config: UNetConfig, batch: int, bfloat16: bool, checkpoint: bool, bfloat16_blocks: bool
) -> tuple[list[tuple[int, int]], int, int, int]:
    """What a forward pass keeps, in the order of the layers, and what the backward pass adds.

    Returns:
        (bytes saved for the backward pass, bytes of parameters first used there: the backward pass allocates their
        gradients when it gets there); temporary bytes of the backward pass, two gradients as large as the largest saved
        tensor; parameters of the network, and of its largest block.
    """
    label_rows = config.num_classes * config.condition_width                    # without the null label's row
    with torch.device("meta"):
        unconditional = config.replace(num_classes=0, guidance_range=None)      # fake labels have no values
        model = LaMambaUNet(unconditional).train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model.to_empty(device="cpu")
        blocks = [block for block in model.modules() if isinstance(block, LaMambaBlock)]
        for block in blocks if bfloat16_blocks else ():                         # as FSDP2 gathers them
            block.to(torch.bfloat16)
        if checkpoint:
            model.enable_gradient_checkpointing()
        x = torch.empty(batch, config.in_channels, *config.input_size)
        t = torch.zeros(batch)
        parameters = {address(p): p.numel() for p in model.parameters()}
        buffers = {address(b) for b in model.buffers()}
        cast: Any = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
        with saved_storages(buffers) as kept, cast:
            output = model(x, t)
        unused = sum(number for key, number in parameters.items() if key not in kept)
        events = [
            (0, FLOAT * (label_rows + unused)),                                 # used, not saved: biases, tables
            *((0, FLOAT * parameters[key]) if key in parameters else (kept[key].nbytes(), 0) for key in kept),
            (3 * output.nbytes, 0),                                             # of the loss: output, noise, difference
        ]
        largest_block = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
        transient = _block_bytes(model, batch, cast, buffers | set(parameters)) if checkpoint else \
            2 * max(saved for saved, _ in events)
        return events, transient, label_rows + sum(parameters.values()), largest_block


def _block_bytes(model: LaMambaUNet, batch: int, cast: Any, own: set[int]) -> int:
    """Largest memory of the backward pass of one block, from running blocks of the finer grids alone."""
    largest = 0
    geometries = dict(zip(GEOMETRY_SCALES, model.geometries, strict=True))
    c = torch.zeros(batch, model.architecture.condition_width)
    stages: list[tuple[Any, int]] = [(model.encoder[0], 1), (model.decoder[3], 1), (model.decoder[2], 2)]
    for stage, scale in stages:
        block = next(iter(stage.blocks.values()), None)
        if block is None:
            continue
        geometry = geometries[scale]
        width = model.architecture.stage_width(0 if scale == 1 else 1)
        x = torch.zeros(batch, *geometry.grid, width, requires_grad=True)
        with saved_storages(own) as kept, cast:
            output = block(x, c, geometry)
        del output
        sizes = [storage.nbytes() for storage in kept.values()]
        largest = max(largest, sum(sizes) + 2 * max(sizes))
    return largest
