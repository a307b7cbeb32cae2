"""Time and peak memory of LaMamba-XL beside DiT-XL/2 on this GPU: forward passes, training steps, a profile by kernel.

    python benchmarks/networks_gpu.py [--seconds 1] [--wait 95] [--json FILE]

bfloat16. Each network at each size is a process of its own: all of them compile at the same time, and then take turns
on the GPU. Those that are not ready after --wait seconds are left out. The file is written after every line.

    eager               kernel by kernel
    graphed             as sampling runs it: conditioning computed ahead, a CUDA graph where the sampler records one;
                        for DiT a CUDA graph of the compiled network
    compiled            by torch.compile; DiT with the attention that is fastest at its size
    train, compiled     forward, backward, AdamW; autocast over float32 weights

Milliseconds are medians of single passes. Peak memory is what tensors take at once, weights counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from scan_gpu import DEVICE, device_name, milliseconds
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lamamba.benchmarking.peers.dit import SIZES, DiT, DiTSize
from lamamba.benchmarking.throughput import Case, build, inputs, proc_bytes
from lamamba.benchmarking.worker import prepare
from lamamba.config import UNetConfig
from lamamba.inference.conditioning import ConditionedNetwork
from lamamba.models.unet import LaMambaUNet
from lamamba.utils.files import write_atomically

OURS, PEER = "xl", "dit-xl-2"
ATTENTIONS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
TINY, TINY_SIZE = DiTSize(32, 2, 2), 32
"""Of dry runs: DiT, and the side of an image in pixels."""
KERNELS = 30
"""Lines of a profile."""
PROFILED_SIZE, PROFILED_PASSES = 256, 3


@dataclass(frozen=True)
class Job:
    """A network in a process of its own."""

    network: str
    image_size: int
    images: int
    mode: str = "forward"
    """forward or train."""
    compile: bool = True
    """A step of training compiled; forward passes are timed in every way."""
    tiny: bool = False

    @property
    def case(self) -> Case:
        return Case(self.network, self.image_size, self.images, "bfloat16", DEVICE, self.mode, packed=False)  # type: ignore[arg-type]


FORWARD = tuple(Job(name, size, images) for size, images in ((256, 64), (512, 16), (1024, 4), (2048, 1))
                for name in (OURS, PEER))
TRAIN = tuple(Job(name, 256, 16, "train", compiled) for name in (OURS, PEER) for compiled in (False, True))


def make_network(job: Job) -> nn.Module:
    if not job.tiny:
        return build(job.case)
    grid, names = job.image_size // 8, [f"decoder.{stage}.{i}" for stage in range(4) for i in (0, 1)]
    dtype = torch.float32 if job.mode == "train" else torch.bfloat16
    if job.network == PEER:
        return DiT(TINY, grid).to(dtype)
    removed = ("bottleneck", *(f"encoder.{stage}.0" for stage in range(1, 4)), *names[:-1])
    config = UNetConfig(width=32, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1, window_size=4, grid=grid,
                        removed_blocks=removed)
    model = LaMambaUNet(config)
    nn.Module.to(model, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def fastest_attention(job: Job) -> SDPBackend:
    """PyTorch's attention that is the fastest at DiT's size."""
    size, tokens = TINY if job.tiny else SIZES["xl"], (job.image_size // 16) ** 2
    shape = (job.images, size.num_heads, tokens, size.width // size.num_heads)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    times: dict[SDPBackend, float] = {}
    for backend in ATTENTIONS:
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):           # not every one runs everywhere
            times[backend] = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v), 5)
    return min(times, key=lambda backend: times[backend])


def recorded(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call as a CUDA graph; on a CPU the call itself."""
    if DEVICE == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def ways(job: Job, model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """The passes or the step to time; the first call of a compiled one compiles."""
    case, device = job.case, torch.device(DEVICE)
    if job.mode == "train":
        compiled = Case(**{**asdict(case), "compile": job.compile})
        return {"train, compiled" if job.compile else "train": prepare(compiled, model, device)[0]}
    plain, _ = prepare(case, model, device)
    compiled_pass, _ = prepare(Case(**{**asdict(case), "compile": True}), model, device)
    if job.network == PEER:
        return {"eager": plain, "compiled": compiled_pass}                      # "graphed" once this has been compiled
    x, _, labels = inputs(case, device)
    network = ConditionedNetwork(model, [500.0], labels.tolist())  # type: ignore[arg-type]
    timestep = torch.full((job.images,), 500.0)

    def sampling() -> Tensor:
        with torch.no_grad():
            return network(x, timestep, labels)

    return {"eager": plain, "compiled": compiled_pass, "graphed": sampling}


def peak_memory() -> int | None:
    """Bytes of tensors at once since the last reset; on a CPU those of the process."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else proc_bytes("/proc/self/status", "VmHWM")


def measure(job: Job, way: str, call: Callable[[], Tensor], seconds: float) -> dict[str, Any]:
    """The row of one way."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = milliseconds(call, 1)
    ms = milliseconds(call, max(3, min(100, int(1000 * seconds / first)))) if not job.tiny else first
    return {**asdict(job), "way": way, "ms": ms, "images_per_second": 1000 * job.images / ms,
            "peak_memory_bytes": peak_memory()}


def kernels(call: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Milliseconds and calls of a pass by kernel, the longest first; on a CPU by operator."""
    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    call()
    with profile(activities=[activity]) as trace:
        for _ in range(PROFILED_PASSES):
            call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    attribute = f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total"
    found = sorted(trace.key_averages(), key=lambda event: -getattr(event, attribute))
    return [{"kernel": event.key, "ms": getattr(event, attribute) / 1000 / PROFILED_PASSES,
             "calls": event.count / PROFILED_PASSES} for event in found[:KERNELS]]


def checked(job: Job, model: nn.Module) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The ways that work, each called once, and the errors of the others."""
    calls, errors = ways(job, model), {}
    for way, call in list(calls.items()):
        try:
            if not torch.isfinite(call()).all():
                raise RuntimeError("the output is not finite")
            if (job.network, job.mode, way) == (PEER, "forward", "compiled"):
                calls["graphed"] = recorded(call)
        except Exception as error:                                              # the other ways go on
            traceback.print_exc()
            errors[way] = message(error)
    return {way: call for way, call in calls.items() if way not in errors}, errors


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def work(job: Job, seconds: float, connection: Connection) -> None:
    """A worker: it builds and compiles, says that it is ready, waits for its turn, and sends a row for each way."""
    try:
        torch.manual_seed(0)
        attention = fastest_attention(job) if job.network == PEER else None
        with sdpa_kernel([attention, SDPBackend.MATH]) if attention else contextlib.nullcontext():
            calls, errors = checked(job, make_network(job))
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            connection.send({"ready": True})
            connection.recv()
            for way, error in errors.items():
                connection.send({**asdict(job), "way": way, "error": error})
            for way, call in calls.items():
                row = {**measure(job, way, call, seconds), "attention": attention and attention.name.lower()}
                if job.mode == "forward" and (job.tiny or job.image_size == PROFILED_SIZE) and way != "graphed":
                    row["kernels"] = kernels(call)
                connection.send(row)
        connection.send({"done": True})
    except Exception as error:                                                  # the parent goes on with the others
        traceback.print_exc()
        connection.send({**asdict(job), "error": message(error)})
        connection.send({"done": True})


def run_jobs(jobs: tuple[Job, ...], seconds: float, wait: float) -> Iterator[dict[str, Any]]:
    """The rows of all jobs, with "error" in those that fail: workers start together and take turns."""
    context, began, workers = multiprocessing.get_context("spawn"), time.perf_counter(), []
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(job, seconds, theirs), daemon=True)
        process.start()
        theirs.close()
        workers.append((job, process, ours))
    ready = []
    for job, process, connection in workers:
        if connection.poll(max(0.0, began + wait - time.perf_counter())):
            ready.append((job, process, connection))
        else:
            process.kill()                                                      # it would compile beside the others
            yield {**asdict(job), "error": f"not ready after {wait:.0f} s"}
    for job, process, connection in ready:
        try:
            row = connection.recv()
            if "ready" in row:
                connection.send("measure")
                row = connection.recv()
            while "done" not in row:
                yield row
                row = connection.recv()
        except (EOFError, OSError):
            yield {**asdict(job), "error": "its process ended"}
        process.join(10)
        process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1, help="that each way is timed")
    parser.add_argument("--wait", type=float, default=95, help="seconds for building and compiling, twice")
    parser.add_argument("--dry-run", action="store_true", help="tiny networks, on the CPU too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.dry_run:
        raise SystemExit("no CUDA device here: nothing to time")
    waves, rows = (FORWARD, TRAIN), []
    if options.dry_run:
        waves = ((*(Job(name, TINY_SIZE, 1, tiny=True) for name in (OURS, PEER)),
                  Job(OURS, TINY_SIZE, 1, "train", False, tiny=True)),)
    print(f"{device_name()}, torch {torch.__version__}")
    for jobs in waves:
        for row in run_jobs(jobs, options.seconds, options.wait):
            rows.append(row)
            what = f"{row['network']:9} {row['image_size']:5} px {row['images']:3} images"
            if "error" in row:
                print(f"{what}  {row.get('way', row['mode'])}: {row['error']}", flush=True)
            else:
                memory = f"{(row['peak_memory_bytes'] or 0) / 2**30:6.2f} GiB"
                print(f"{what}  {row['way']:16} {row['ms']:9.2f} ms {row['images_per_second']:9.1f} images/s {memory}",
                      flush=True)
            if options.json:
                result = {"device": device_name(), "rows": rows}
                write_atomically(options.json, json.dumps(result, indent=1) + "\n")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
