"""Devices and processes: which device this process uses, and how processes that work together agree.

One process or many, started by `torchrun`, `accelerate launch` or by hand; the code above reads the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lamamba.utils.errors import RankZeroError
from lamamba.utils.text import first_line

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=12)
"""Of processes that wait while others score units, or rank 0 plans or computes figures."""


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
        raise ValueError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' has shapes without numbers: give cpu, a GPU such as cuda:1, or auto")
    return device


def local_device(name: str) -> torch.device:
    """Like `pick_device`, and under a launcher the GPU of this process among those of its machine."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a GPU or this processor has instructions for products in bfloat16, as PyTorch knows."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()       # since torch 2.12
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def launched_processes() -> int:
    """How many processes a launcher has started, this one among them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The rank of this process, by the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_rank_zero() -> bool:
    """Whether this process is rank 0, by the launcher's environment."""
    return launched_rank() == 0


def end_processes() -> None:
    """Destroy torch.distributed's default group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def part(items: range, index: int, count: int) -> range:
    """The index-th of count neighbouring parts whose sizes differ by one at most."""
    size, more = divmod(len(items), count)
    start = index * size + min(index, more)
    return items[start : start + size + (index < more)]


class ProcessGroup:
    """This rank among those that work together, in torch.distributed's default group where there are several."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.is_rank_zero = rank == 0

    def on_rank_0(self, work: Callable[[], T]) -> T | None:
        """Call a function on rank 0 while the other ranks wait; None on those.

        Raises:
            RankZeroError: on the other ranks, when rank 0 raises.
        """
        result, failure, message = None, None, None
        if self.is_rank_zero:
            try:
                result = work()
            except (Exception, SystemExit) as error:
                failure, message = error, f"{type(error).__name__}: {error}"
        if self.world_size > 1:
            message = self.broadcast(message)
        if failure is not None:
            raise failure
        if message is not None:
            raise RankZeroError(f"rank 0 stopped: {message}")
        return result

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over all ranks, in float64."""
        return tuple(self.all_reduce(np.array(values, dtype=np.float64)).tolist())

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """Elementwise sum of an array over all processes, in float64."""
        if self.world_size == 1:
            return array
        total = torch.tensor(array, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def launched_group() -> Iterator[ProcessGroup]:
    """The processes that a launcher has started, connected by gloo for the time of the context.

    A default group that exists already is used as it is, and left.
    """
    world_size = launched_processes()
    is_new = world_size > 1 and not dist.is_initialized()
    if is_new:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield ProcessGroup(launched_rank(), world_size, torch.device("cpu"))
    finally:
        if is_new:
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a split tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A split tensor gathered (a collective: all ranks must call it); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: on the GPU what tensors took, on the CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
