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
def repeatable(threads: int = 0) -> Iterator[None]:
    """Deterministic convolutions of cuDNN without a search for the fastest, and a number of threads (0: as it is)."""
    cudnn, num_threads = torch.backends.cudnn, torch.get_num_threads()
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    torch.set_num_threads(threads or num_threads)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        torch.set_num_threads(num_threads)
