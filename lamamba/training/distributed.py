"""The processes that train together: who they are, what each does, how they agree.

One process or many, started by `torchrun`, `accelerate launch` or by hand; the code above reads the same. A batch is
cut by place: process r of n has the r-th of n neighbouring parts, so that together they see what one would see.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from lamamba.models.blocks import LaMambaBlock
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import PrecisionOptions, TrainConfig
from lamamba.utils.distributed import ProcessGroup, launched_processes, part, pick_device


class Processes(ProcessGroup):
    """This process among those that train together.

    Raises:
        ValueError: when the launcher or the device asks for what does not fit the configuration.
    """

    def __init__(self, config: TrainConfig):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
            if os.environ.get(variable, "false").lower() == "true":
                raise ValueError(
                    f"accelerate launch asks for {name}; start without it and give --processes.sharding full, "
                    "which splits the network by PyTorch's own FSDP2"
                )
        launched = launched_processes()
        if launched > 1 and ":" in config.device:
            raise ValueError(f"device={config.device!r} cannot serve {launched} processes; use auto, cuda or cpu")
        device = pick_device(config.device)
        AcceleratorState._reset_state()                                         # a former run's precision; no group
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if config.precision.autocast == "bfloat16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=config.processes.timeout_minutes))],
        )
        count: int = self._accelerator.num_processes
        super().__init__(self._accelerator.process_index, count, self._accelerator.device if count > 1 else device)
        self.is_sharded = config.processes.sharding == "full"
        if self.is_sharded and self.count == 1:
            raise ValueError(
                "processes.sharding='full' splits a network among several processes and this is only one; start them "
                "as in torchrun --nproc-per-node 2 -m lamamba train ..., or leave it out"
            )
        pieces = self.count * config.processes.accumulation_steps
        if config.batch_size < pieces:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be cut into {self.count} processes x "
                f"{config.processes.accumulation_steps} accumulation steps; every piece needs an image"
            )

    def share(self, places: range) -> range:
        """This process's part of the batch's places."""
        return part(places, self.index, self.count)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass: bfloat16 products where the configuration asks for them."""
        return self._accelerator.autocast()

    def distribute(self, model: LaMambaUNet, averages: list[LaMambaUNet]) -> nn.Module:
        """What a training step calls: the network itself, in DDP's wrapper, or split among all (in place)."""
        if self.is_sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # the network's output is a view, which nothing here changes in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            mesh = init_device_mesh(self.device.type, (self.count,))
            for network in (model, *averages):
                for block in network.modules():
                    if isinstance(block, LaMambaBlock):
                        fully_shard(block, mesh=mesh)
                fully_shard(network, mesh=mesh, reshard_after_forward=True)
            return model
        if self.count > 1:
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # a depthwise kernel's gradient has other strides along its dimension of one: the same memory
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False, gradient_as_bucket_view=True,          # the new name is younger than 2.11
            )
        return model

    def accumulate(self, network: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around one piece of a batch: gradients are exchanged with the last one only."""
        if is_last:
            return contextlib.nullcontext()
        if self.is_sharded:
            return _without_gradient_exchange(network)
        return self._accelerator.no_sync(network)

@contextlib.contextmanager
def _without_gradient_exchange(network: Any) -> Iterator[None]:
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


@contextlib.contextmanager
def precision_policy(options: PrecisionOptions) -> Iterator[None]:
    """PyTorch's global switches as the options say, and as they were afterwards."""
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
