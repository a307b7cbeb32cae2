"""The private parts of PyTorch that simulations need, apart because they take seconds to import.

The fake process group's collectives return at once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lamamba.benchmarking.private_torch import FakeTensor, TorchDispatchMode

__all__ = ["MemoryTracker", "Traffic", "begin_fake_group", "ddp_buckets"]

KINDS = {
    "all_gather": ("allgather", "all_gather"), "reduce_scatter": ("reduce_scatter",),
    "all_reduce": ("allreduce", "all_reduce"),
}
"""What operators of torch.distributed are called that belong to a kind of collective."""
CATEGORIES = {
    "weights": ("Sharded Param", "Parameter"),
    "gathered weights": ("Unsharded Param", "All Gather"),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter", "Gradient"),
    "optimizer": ("OptState", "Optstate"),
    "activations": ("Activation", "Inputs", "Buffer", "Other"),
    "temporary": ("Temp",),
}
"""What the trackers' categories are called here."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of DDP's buckets, by default."""


def begin_fake_group(world_size: int) -> None:
    """Begin a default process group of this many ranks, of which this process is rank 0 and the only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def ddp_buckets(parameters: list[nn.Parameter]) -> int:
    """Number of buckets in which DDP sums gradients that come in the opposite order of the parameters."""
    gradients: list[Tensor] = [*reversed(parameters)]
    indices, _ = dist._compute_bucket_assignment_by_size(gradients, [FIRST_BUCKET, BUCKET])
    return len(indices)


class Traffic(TorchDispatchMode):
    """Counts collectives, by their kind and number of ranks, and the bytes of their whole (gathered) tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device                                          # asked so often that it takes seconds
        if any(kind is DTensor for kind in types):
            return NotImplemented                                               # DTensor comes back with local tensors
        result = func(*args, **(kwargs or {}))
        if func in collective_ops and func not in sync_ops:
            name = str(func).partition("::")[2] or str(func).split(".")[1]
            kind = next((kind for kind, names in KINDS.items() if name.lstrip("_").startswith(names)), name)
            group = CollectiveOp.get_process_group(func, args).size()
            self.counts[kind, group] += 1
            self.bytes[kind, group] += CollectiveOp.get_comm_tensor_size(func, result, args, kwargs or {})
        return result


class _OnlyTotals:
    """The peak of all memory without those of every module, which cost more than the step that is tracked."""

    _curr_mem_snap: dict[Any, dict[Any, int]]
    _peak_mem: dict[Any, int]
    _peak_mem_snap: dict[Any, dict[Any, int]]

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


class _ShardedTracker(_OnlyTotals, FSDPMemTracker):
    pass


class _WholeTracker(_OnlyTotals, MemTracker):
    pass


class MemoryTracker:
    """Bytes by category while it is entered, of a network that is sharded, or whole.

    Args:
        model: sharded by FSDP2, or not.
        optimizer: of its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        if isinstance(model, FSDPModule):
            self._tracker: MemTracker = _ShardedTracker(model, optimizer)
        else:
            self._tracker = _WholeTracker()
            self._tracker.track_external(model, optimizer)

    def __enter__(self) -> MemoryTracker:
        self._tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tracker.__exit__(*error)

    def track_inputs(self, *inputs: Tensor) -> None:
        """Count these tensors, which were made before."""
        if isinstance(self._tracker, FSDPMemTracker):
            self._tracker.track_inputs(inputs)
        else:
            self._tracker.track_external(*inputs)

    def begin_pass(self) -> None:
        """Before each further forward pass: forget what belongs to the modules in the last one."""
        self._tracker.reset_mod_stats()

    def peak(self) -> dict[str, int]:
        """Bytes of each category when most were in use."""
        found: Counter[str] = Counter()
        for snapshot in self._tracker.get_tracker_snapshot("peak").values():
            for name, number in snapshot.items():
                found[name if isinstance(name, str) else name.value] += number
        return {ours: sum(found[name] for name in names) for ours, names in CATEGORIES.items()}
