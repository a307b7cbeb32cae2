"""One training step, simulated or real: memory by category, collectives and their bytes.

    python -m lamamba.benchmarking.simulation       <- the fields of Setup as JSON, one line
                                                    -> a list of the fields of Step, one for each micro-batch size

A simulation has a fake process group and fake tensors: nothing is computed, sent or allocated. It is a process of its
own because the group is the process's, and because GPU operators are reached on CPU tensors by settings that Triton
reads when it is imported. DDP cannot run on fake tensors: its network is whole, and its sums are known (4 bytes for
each parameter, in DDP's own buckets).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lamamba.benchmarking.private_distributed import (
    Traffic,
    begin_fake_group,
    ddp_buckets,
    memory_tracker,
    peak_by_category,
)
from lamamba.benchmarking.private_torch import FakeTensorMode
from lamamba.config import UNetConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.training.distributed import make_mesh, shard_network

Kind = Literal["ddp", "fsdp", "hsdp"]
SIMULATED = {"TRITON_INTERPRET": "1", "LAMAMBA_BACKEND": "triton"}
"""With these, CPU tensors reach the GPU operators, of which fake tensors need only shapes."""
SCALARS = 3
"""Numbers that all ranks sum after a step (training/loop.py), without a teacher."""


@dataclass(frozen=True)
class Setup:
    """What is simulated."""

    architecture: dict[str, Any]
    """UNetConfig.to_dict()."""
    kind: Kind
    world_size: int
    shard_size: int
    """Ranks that hold a network together; 1 for DDP."""
    micro_batches: tuple[int, ...]
    """Images of a forward pass on a rank; a step is made for each."""
    accumulation_steps: int = 1
    bfloat16: bool = False
    checkpoint_activations: bool = False


@dataclass(frozen=True)
class Step:
    """What one rank does and holds in a step."""

    memory: dict[str, int]
    """Bytes of each category at the peak, without averages."""
    collectives: dict[str, int]
    """Number of each kind of collective over so many ranks: {"all_gather 64": 46, ...}."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Of their whole tensors: what is gathered, or the input of a sum."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


def begin(setup: Setup, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Begin to simulate a step for each micro-batch size, in another process; `finish` waits for it.

    Args:
        setup: of the step.
        environment: variables of that process; by default those that reach the GPU operators.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    process = subprocess.Popen(
        [sys.executable, "-m", "lamamba.benchmarking.simulation"], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**inherited, **(environment or SIMULATED)},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(dataclasses.asdict(setup)) + "\n")
    process.stdin.flush()
    return process


def finish(process: subprocess.Popen[str]) -> list[Step]:
    """The result of `begin`.

    Raises:
        RuntimeError: when the simulation failed.
    """
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the simulation of a step failed: {(errors.strip().splitlines() or ['it was killed'])[-1]}")
    return [Step(**step) for step in json.loads(output)]


def main() -> None:
    values = json.loads(sys.stdin.readline())
    setup = Setup(**{**values, "micro_batches": tuple(values["micro_batches"])})
    warnings.simplefilter("ignore")
    steps = _simulate(setup)
    print(json.dumps([dataclasses.asdict(step) for step in steps]))


def _simulate(setup: Setup) -> list[Step]:
    config = UNetConfig.from_dict(setup.architecture)
    with torch.device("meta"):
        model = LaMambaUNet(config).train()
    is_sharded = setup.kind != "ddp"
    if is_sharded:                                                              # in fake mode it takes minutes
        begin_fake_group(setup.world_size)
        shard_network(model, make_mesh("cpu", setup.world_size, setup.shard_size), bfloat16=setup.bfloat16)
    if setup.checkpoint_activations:
        model.enable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        steps = measure(model, None, setup)
    if is_sharded:
        dist.destroy_process_group()
        return steps
    return [_with_ddp(step, list(model.parameters()), setup.world_size) for step in steps]


def _with_ddp(step: Step, parameters: list[nn.Parameter], world_size: int) -> Step:
    """The step with DDP's sums of gradients."""
    if world_size == 1:
        return step
    gradients, key = sum(4 * parameter.numel() for parameter in parameters), f"all_reduce {world_size}"
    return Step(step.memory, {key: ddp_buckets(parameters) + 1}, {key: gradients + 8 * SCALARS})


def measure(model: LaMambaUNet, network: nn.Module | None, setup: Setup) -> list[Step]:
    """Measure a step, in which the optimizer's state exists already, on random images for each micro-batch size.

    Updates in place and the gradient's norm, which follow, take no memory that matters.

    Args:
        model: real or fake, on the CPU, sharded or not.
        network: the module that a step calls, where it is another one than the model (DDP).
        setup: of the step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    peaks, traffic = [], Traffic()
    for images in setup.micro_batches:
        optimizer.zero_grad(set_to_none=setup.kind != "ddp")                    # DDP's buckets hold them always
        for parameter in model.parameters() if setup.kind == "ddp" else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        inputs, traffic = _inputs(model.architecture, images), Traffic()
        memory = memory_tracker(model, optimizer, inputs)
        with memory, traffic:
            for number in range(setup.accumulation_steps):
                memory.reset_mod_stats()
                if setup.kind != "ddp":
                    sharded: Any = model
                    sharded.set_requires_gradient_sync(number == setup.accumulation_steps - 1)
                _forward_backward(network or model, setup.bfloat16, *inputs)
        peaks.append(peak_by_category(memory))
    with traffic:
        if setup.kind != "ddp":                                                 # of norms; DTensor takes seconds more
            norms = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
            dist.all_reduce(torch.zeros(len(norms)), group=norms[0].device_mesh.get_group(-1))
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(SCALARS, dtype=torch.float64))
    counts, sizes = ({f"{kind} {ranks}": number for (kind, ranks), number in sorted(found.items())}
                     for found in (traffic.counts, traffic.bytes))
    return [Step(peak, counts, sizes) for peak in peaks]


def _inputs(config: UNetConfig, images: int) -> list[Tensor]:
    """x, timestep, and labels as mixtures: fake labels have no numbers that could be checked."""
    x, t = torch.randn(images, config.in_channels, *config.input_size), torch.rand(images) * 1000
    return [x, t, torch.rand(images, config.num_classes + 1)] if config.num_classes else [x, t]


def _forward_backward(network: nn.Module, bfloat16: bool, x: Tensor, t: Tensor, labels: Tensor | None = None) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = network(x, t, labels)
    ((output.float() - output.detach().float().roll(1)) ** 2).mean().backward()


if __name__ == "__main__":
    main()
