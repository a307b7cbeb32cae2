"""The processes that train together: who they are, what each does, how they agree.

One process or many, started by `torchrun`, `accelerate launch` or by hand; the code above reads the same. A batch is
cut by place: process r of n has the r-th of n neighbouring parts, so that together they see what one would see.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lamamba.models.block import LaMambaBlock
from lamamba.models.unet import LaMambaUNet
from lamamba.training.config import PrecisionOptions, TrainConfig

T = TypeVar("T")


class MainProcessError(RuntimeError):
    """The main process has refused or failed, and says so itself; the others stop without repeating it."""


def pick_device(name: str) -> torch.device:
    """ "auto" as a GPU where there is one, otherwise the CPU; any other name as it is.

    Raises:
        ValueError: for a device that PyTorch does not know or that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def local_device(name: str) -> torch.device:
    """Like `pick_device`, and under a launcher the GPU of this process among those of its machine."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def launched_processes() -> int:
    """How many processes a launcher has started, this one among them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that speaks, before anything else is known."""
    return int(os.environ.get("RANK", "0")) == 0


def end_processes() -> None:
    """Leave the group, if there is one; the process trains no more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def part(items: range, index: int, count: int) -> range:
    """The index-th of count neighbouring parts whose sizes differ by one at most."""
    size, more = divmod(len(items), count)
    start = index * size + min(index, more)
    return items[start : start + size + (index < more)]


class Processes:
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
        self.count: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.is_main = self.index == 0
        self.device = self._accelerator.device if self.count > 1 else device
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

    def together(self, work: Callable[[], T]) -> T | None:
        """Let the main process work while the others wait for it; None for the others.

        Raises:
            MainProcessError: on the others, when the main process raises.
        """
        result, failure, message = None, None, None
        if self.is_main:
            try:
                result = work()
            except (Exception, SystemExit) as error:
                failure, message = error, f"{type(error).__name__}: {error}"
        if self.count > 1:
            message = self.broadcast(message)
        if failure is not None:
            raise failure
        if message is not None:
            raise MainProcessError(f"the main process stopped: {message}")
        return result

    def broadcast(self, value: T) -> T:
        """The main process's value, everywhere."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order, everywhere."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over all processes, in float64."""
        if self.count == 1:
            return values
        box = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(box)
        return tuple(box.tolist())

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

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def _without_gradient_exchange(network: Any) -> Iterator[None]:
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A split tensor put together (all processes must ask); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: on the GPU what tensors took, on the CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
