"""The private parts of PyTorch that simulations need, apart because they take seconds to import.

The fake process group's collectives return at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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

__all__ = ["Traffic", "begin_fake_group", "ddp_buckets", "memory_tracker", "peak_by_category"]

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


def memory_tracker(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Sequence[Tensor]) -> MemTracker:
    """Tracks memory while it is entered. Before each further forward pass its `reset_mod_stats` must be called.

    Args:
        model: sharded by FSDP2, or whole.
        optimizer: of its parameters.
        inputs: of the model; they were made before, and count, too.
    """
    if isinstance(model, FSDPModule):
        sharded = _ShardedTracker(model, optimizer)
        sharded.track_inputs(tuple(inputs))
        return sharded
    whole = _WholeTracker()
    whole.track_external(model, optimizer, *inputs)
    return whole


def peak_by_category(tracker: MemTracker) -> dict[str, int]:
    """Bytes of each category when most were in use."""
    found: Counter[str] = Counter()
    for snapshot in tracker.get_tracker_snapshot("peak").values():
        for name, number in snapshot.items():
            found[name if isinstance(name, str) else name.value] += number
    return {ours: sum(found[name] for name in names) for ours, names in CATEGORIES.items()}
