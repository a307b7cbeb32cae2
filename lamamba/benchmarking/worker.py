"""A process with one network to time: python -m lamamba.benchmarking.worker, one JSON object per line.

    -> the fields of throughput.Case             <- {"ready": true, ...}       after the first pass
    -> {"passes": 3}                             <- {"ms": [...]}              milliseconds of each pass
    -> (end of file)                             <- {"peak_memory_bytes": ...} before it ends

One process per network separates their peak memory, and allows settings that the C library reads at its start.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from lamamba.benchmarking.throughput import Case, build, inputs, proc_bytes
from lamamba.inference.packing import pack_convolutions, pack_weights


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr                                # replies alone on standard output
    try:
        _serve(sys.stdin, replies)
    except Exception as error:                                                  # the parent raises it
        message = " ".join(str(error).split())[:500]
        _reply(replies, error=f"{type(error).__name__}: {message}")
        raise


def _reply(replies: TextIO, **values: Any) -> None:
    print(json.dumps(values), file=replies, flush=True)


def _serve(requests: TextIO, replies: TextIO) -> None:
    case = Case(**json.loads(requests.readline()))
    if case.threads:
        torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    before = proc_bytes("/proc/self/status", "VmRSS")
    torch.manual_seed(0)
    model = build(case)
    one_pass, weights_bytes = prepare(case, model, device)
    began = time.perf_counter()
    first = one_pass()
    _wait(device)
    seconds = time.perf_counter() - began
    if not torch.isfinite(first).all() or not first.any():
        raise RuntimeError(f"{case.model} gave an output that is not finite, or all zero")
    _reply(replies, ready=True, first_pass_seconds=seconds, weights_bytes=weights_bytes, packed=case.packs_weights)
    for line in requests:
        times = []
        for _ in range(json.loads(line)["passes"]):
            began = time.perf_counter()
            one_pass()
            _wait(device)
            times.append(1000 * (time.perf_counter() - began))
        _reply(replies, ms=times)
    _reply(replies, peak_memory_bytes=_peak_memory(device, before))


def prepare(case: Case, model: torch.nn.Module, device: torch.device) -> tuple[Callable[[], torch.Tensor], int]:
    """The function to time, which returns the output or the loss, and the bytes of weights or training state."""
    x, timestep, labels = inputs(case, device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if case.packs_weights:
        pack_weights(model, case.tokens * case.batch)
    if case.packs_convolutions:
        pack_convolutions(model)
    _reset_peak()
    network = torch.compile(model, dynamic=False) if case.compile else model
    if case.mode == "forward":
        model.eval()

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return network(x, timestep, labels)

        return forward, weights

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.randn(case.batch, 8, *x.shape[2:], device=device)
    mixed = torch.autocast(device.type, getattr(torch, case.dtype), enabled=case.dtype != "float32")

    def step() -> torch.Tensor:
        with mixed:
            output = network(x, timestep, labels)
        loss = torch.nn.functional.mse_loss(output.float(), target[:, : output.shape[1]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, 4 * weights                                                    # weights, gradients, two moments


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak() -> None:
    """Return freed memory to the system and count the peak from here: packed weights do not include their making."""
    with contextlib.suppress(OSError, AttributeError):                          # Linux with glibc has both
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device, before: int | None) -> int | None:
    """Peak memory: of the GPU's allocator, or the high-water mark of this process less the resident memory before.

    The latter has the allocator's overhead; None where the system does not report it. (ru_maxrss would inherit the
    parent's.)
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = proc_bytes("/proc/self/status", "VmHWM")
    return peak - before if peak is not None and before is not None else None


if __name__ == "__main__":
    main()
