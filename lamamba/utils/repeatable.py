"""Settings of PyTorch under which the same work gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_random_state() -> Iterator[None]:
    """PyTorch's global random state, of the caller afterwards: new modules draw weights from it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def computing_threads(threads: int | None) -> Iterator[None]:
    """Compute with this many threads of the CPU; None and 0: with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def repeatable(threads: int = 0) -> Iterator[None]:
    """Deterministic convolutions of cuDNN without a search for the fastest, and a number of threads (0: as it is)."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with computing_threads(threads):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
