"""The ranks that train together: torch.distributed's group, data and sharded parallelism, precision.

One process or many, started by `torchrun`, `accelerate launch` or by hand. Rank r of n has the r-th of n neighbouring
parts of each batch.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lamamba.models.blocks import LaMambaBlock
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import PrecisionOptions, TrainConfig
from lamamba.utils.distributed import ProcessGroup, launched_processes, local_device, pick_device


class Processes(ProcessGroup):
    """This rank among those that train together; begins torch.distributed's default group where there are several.

    Raises:
        ValueError: when launcher, device and configuration do not fit together.
    """

    def __init__(self, config: TrainConfig):
        check_processes(config)
        world_size = launched_processes()
        self._autocast, self._sharding = config.precision.autocast, config.processes.sharding
        self.is_sharded = self._sharding != "none"
        self._shard_size = shard_size(config, world_size)
        if world_size == 1:
            super().__init__(0, 1, pick_device(config.device))
            return
        device = local_device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(device)
            dist.init_process_group(backend, timeout=timedelta(minutes=config.processes.timeout_minutes))
        super().__init__(dist.get_rank(), world_size, device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward pass: bfloat16 products where the configuration says so."""
        if self._autocast == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def distribute(self, model: LaMambaUNet, averages: list[LaMambaUNet]) -> nn.Module:
        """The module that a training step calls: the network itself, in DDP, or sharded by FSDP2 (in place)."""
        if self.is_sharded:
            # the network's output is a view, which nothing here changes in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            mesh = make_mesh(self.device.type, self.world_size, self._shard_size)
            for network in (model, *averages):
                shard_network(network, mesh, bfloat16=self._autocast == "bfloat16")
            return model
        if self.world_size > 1:
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # a depthwise kernel's gradient has other strides along its dimension of one: the same memory
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False, gradient_as_bucket_view=True,          # the new name is younger than 2.11
            )
        return model

    def accumulate(self, network: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: gradients are reduced over ranks with the last one only."""
        if is_last:
            return contextlib.nullcontext()
        if self.is_sharded:
            return _without_gradient_sync(network)
        if isinstance(network, nn.parallel.DistributedDataParallel):
            return network.no_sync()
        return contextlib.nullcontext()


def make_mesh(device_type: str, world_size: int, shard_size: int) -> DeviceMesh:
    """All processes, or (copies, shard_size) of them where several groups hold the network; a collective."""
    if shard_size == world_size:
        return init_device_mesh(device_type, (world_size,))
    return init_device_mesh(device_type, (world_size // shard_size, shard_size), mesh_dim_names=("copies", "shards"))


def shard_network(network: LaMambaUNet, mesh: DeviceMesh, *, bfloat16: bool) -> None:
    """Split a network by FSDP2, in place: each block is gathered when it runs, the other layers for the whole pass.

    Args:
        network: of float32 weights.
        mesh: of `make_mesh`.
        bfloat16: blocks are gathered in bfloat16 (gradients are summed in float32). Under autocast alone they would be
            gathered in float32, and each rank would keep the casts of all weights until the backward pass.
    """
    shards = mesh.size(-1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        """On a dimension that divides evenly: others are padded, W_x (4, ...) on 64 ranks to 16 times its size."""
        dim = shard_dimension(parameter.shape, shards)
        return None if dim is None else Shard(dim)

    policy = MixedPrecisionPolicy()
    if bfloat16:                                                                # times and sums stay float32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in network.modules():
        if isinstance(block, LaMambaBlock):
            fully_shard(block, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)
    fully_shard(network, mesh=mesh, reshard_after_forward=True, shard_placement_fn=placement)


def shard_dimension(shape: Sequence[int], shards: int) -> int | None:
    """The first dimension that divides into so many equal shards; None: the first one is padded."""
    return next((dim for dim, size in enumerate(shape) if size % shards == 0), None)


def shard_size(config: TrainConfig, world_size: int) -> int:
    """How many processes hold a network together; 1 without sharding.

    Raises:
        ValueError: when they do not divide all processes, or are as many.
    """
    options = config.processes
    if options.sharding != "hybrid":
        return world_size if options.sharding == "full" else 1
    size = options.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size < 2 or world_size % size or size == world_size:
        raise ValueError(
            f"processes.sharding='hybrid' splits the network among {size} of {world_size} processes "
            "(processes.shard_size, or those of a machine): give at least 2, and at least two such groups; on one "
            "machine sharding='full' is the same"
        )
    return size


def check_processes(config: TrainConfig) -> None:
    """Check that the launcher, its number of processes, and the configuration fit together.

    Raises:
        ValueError: when they do not.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"accelerate launch asks for {name}; start without it and give processes.sharding='full', "
                "which splits the network by PyTorch's own FSDP2"
            )
    world_size = launched_processes()
    if world_size > 1 and ":" in config.device:
        raise ValueError(f"device={config.device!r} cannot serve {world_size} processes; use auto, cuda or cpu")
    if config.processes.sharding != "none" and world_size == 1:
        raise ValueError(
            f"processes.sharding={config.processes.sharding!r} splits a network among several processes and this "
            "is only one; start them as in torchrun --nproc-per-node 2 -m lamamba train ..., or leave it out"
        )
    shard_size(config, world_size)
    if config.batch_size < world_size * config.processes.accumulation_steps:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be cut into {world_size} processes x "
            f"{config.processes.accumulation_steps} accumulation steps; every micro-batch needs an image"
        )


@contextlib.contextmanager
def _without_gradient_sync(network: Any) -> Iterator[None]:
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


@contextlib.contextmanager
def precision_policy(options: PrecisionOptions) -> Iterator[None]:
    """Set PyTorch's global switches as the options say, and restore them."""
    tf32 = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic)
