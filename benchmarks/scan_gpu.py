"""Time of the Triton scan on this GPU beside the lower bounds of its memory traffic and its exponentials.

    python benchmarks/scan_gpu.py [--quick] [--json FILE]

bfloat16 tokens and weights, A and D in float32, at the stages of LaMamba-XL: 256 pixels and batch 64, 512 and 16, 1024
and 4; milliseconds. The bounds are derived in docs/gpu-scan.md, with the copy rate measured here, or rates given as
options. "of bound" is the larger bound divided by the time: 80 % is the aim. The file is written after every line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lamamba.ops import scan_paths
from lamamba.utils.files import write_atomically

IMAGES_AND_SIDES = ((64, 32), (16, 64), (4, 128))
STAGES = ((1, 640, 20), (2, 1280, 40), (4, 2560, 80))
"""How much smaller the stage's grid is, its channels and its rank."""
STATE_SIZES = (1, 16)
NUM_PATHS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(b: int, side: int, c: int, r: int, n: int) -> list[torch.Tensor]:
    l, g, device = side * side, NUM_PATHS, torch.device(DEVICE)
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    delta = torch.exp(torch.rand((g, c), generator=random, device=device) * 4.6 - 6.9)
    tokens = [normal(b, l, c), normal(b, l, g, r), normal(b, l, g, n), normal(b, l, g, n)]
    A = -torch.arange(1.0, n + 1, device=device).expand(g, c, n).contiguous()
    parameters = [normal(g, c, r) * r**-0.5, torch.log(torch.expm1(delta)), A, torch.ones(g, c, device=device)]
    rounded = [tensor.bfloat16() for tensor in (*tokens, *parameters[:2])]
    return [*rounded, *parameters[2:], scan_paths(side, side, device=device)]


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of single calls, after three that are not counted; on a CPU after none."""
    times = []
    if DEVICE == "cpu":
        for _ in range(repeats):
            began = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times)
    for _ in range(3):
        function()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in marks:
        before.record()
        function()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks)


def lower_bounds(b: int, l: int, c: int, r: int, n: int, what: str, rates: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the memory traffic and of the special functions alone (docs/gpu-scan.md)."""
    numbers = b * l * c
    moved, special = {
        "forward": (22 + 8 * (r + 2 * n) / c, 2 + n),
        "backward": (54 + 6 * n, 5 + 2 * n),
    }[what]
    return {
        "bytes_ms": 1000 * numbers * moved / (rates.terabytes * 1e12),
        "special_ms": 1000 * NUM_PATHS * numbers * special / (rates.tera_special * 1e12),
    }


def copying_rate() -> float:
    """TB/s of copying 2 GiB (on a CPU a thousandth of that), reads and writes counted."""
    source = torch.empty(2**31 if DEVICE == "cuda" else 2**21, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), 10) / 1e9


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first stages only")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU too (with TRITON_INTERPRET=1)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--terabytes", type=float, help="copying, TB/s; by default as measured here")
    parser.add_argument("--tera-special", type=float, default=3.7, help="special functions, 10^12 a second")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.dry_run:
        raise SystemExit("no CUDA device here: nothing to time")
    return options


def main() -> None:
    options = parse()
    # after the check: Triton may be missing where there is no GPU
    from lamamba.ops.selective_scan import triton_kernels as kernels

    rate = copying_rate()
    options.terabytes = options.terabytes or rate
    print(f"{device_name()}, torch {torch.__version__}; copying {rate:.2f} TB/s, "
          f"lower bounds for {options.terabytes:.2f} TB/s and {options.tera_special} T special functions a second")
    print(f"{'b':>3} {'l':>6} {'c':>5} {'n':>3}  {'':8} {'ms':>8} {'bytes':>8} {'special':>8} {'of bound':>9}")
    sizes, state_sizes, rows = [(b, full // scale, c, r) for b, full in IMAGES_AND_SIDES
                                for scale, c, r in STAGES[: 1 if options.quick else None]], STATE_SIZES, []
    if options.dry_run:
        sizes, state_sizes, options.repeats = [(1, 4, 32, 4)], (1, 2), 1
    for b, side, c, r in sizes:
        for n in state_sizes:
            inputs = make_inputs(b, side, c, r, n)
            grad_y = torch.randn_like(inputs[0])
            calls = {"forward": lambda x=inputs: kernels.forward(*x),
                     "backward": lambda x=inputs, gy=grad_y: kernels.backward(gy, *x)}
            for what, call in calls.items():
                ms = milliseconds(call, options.repeats)
                bound = lower_bounds(b, side * side, c, r, n, what, options)
                rows.append({"b": b, "l": side * side, "c": c, "r": r, "n": n, "pass": what, "ms": ms, **bound,
                             "share_of_floor": max(bound.values()) / ms})
                print(f"{b:3} {side * side:6} {c:5} {n:3}  {what:8} {ms:8.3f} {bound['bytes_ms']:8.3f} "
                      f"{bound['special_ms']:8.3f} {rows[-1]['share_of_floor']:9.0%}", flush=True)
                if options.json:
                    result = {"device": device_name(), "copying_terabytes": rate, "rows": rows}
                    write_atomically(options.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
