"""Time of the selective scan on this CPU, for each back end.

    python benchmarks/scan_cpu.py [--repeats 15] [--threads 2] [--skip torch]

Times are medians in milliseconds of alternating calls, so that other load affects all alike. Beside each time is its
ratio to torch.exp over as many float32 numbers as the scan has steps (b g l c), in the same run: a scan needs two
exponentials and a logarithm for each. "core" is the scan with time steps of rank 1, where the projection W_dt dt is
negligible; the other rows have the network's rank, c / 32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from timing import keep_freed_memory, medians

from lamamba.ops import native, scan_paths, selective_scan

# name: images, height, width, channels, rank, state sizes
CASES = {
    "32 x 32": (2, 32, 32, 640, 20, (1, 16)),
    "32 x 32, core": (2, 32, 32, 640, 1, (1, 16)),
    "8 x 8, wide": (2, 8, 8, 2560, 80, (1, 16)),
    "8 x 8, many images": (64, 8, 8, 128, 4, (1,)),
    "4 x 4, tiny": (64, 4, 4, 32, 1, (1,)),
}


def make_inputs(b: int, height: int, width: int, c: int, r: int, n: int) -> list[torch.Tensor]:
    l, g = height * width, 4
    delta = torch.exp(torch.rand(g, c) * math.log(100) + math.log(0.001))
    A = -torch.arange(1.0, n + 1).expand(g, c, n).contiguous()
    return [
        torch.randn(b, l, c), torch.randn(b, l, g, r), torch.randn(b, l, g, n), torch.randn(b, l, g, n),
        (2 * torch.rand(g, c, r) - 1) * r**-0.5, torch.log(torch.expm1(delta)), A, torch.ones(g, c),
        scan_paths(height, width),
    ]


def measure(case: tuple, n: int, backends: list[str], repeats: int) -> dict[str, float]:
    """Median milliseconds of a case by back end and pass, and of the exponentials."""
    b, height, width, c, r, _ = case
    inputs = make_inputs(b, height, width, c, r, n)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:-1]] + inputs[-1:]
    grad_y = torch.randn_like(inputs[0])
    numbers = torch.randn(b * 4 * height * width * c)
    out = torch.empty_like(numbers)

    def both(backend: str) -> None:
        torch.autograd.grad(selective_scan(*leaves, backend=backend), leaves[:-1], grad_y)

    functions: dict[str, Callable[[], object]] = {"exp": lambda: torch.exp(numbers, out=out)}
    for backend in backends:
        functions[f"{backend} forward"] = lambda backend=backend: selective_scan(*inputs, backend=backend)
        functions[f"{backend} both"] = lambda backend=backend: both(backend)
    return {name: 1000 * seconds for name, seconds in medians(functions, repeats).items()}


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="calls that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip", nargs="*", default=[], help="back ends not to measure; torch takes most of the time")
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backends = [name for name in ("cpu", "torch") if name not in options.skip]

    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; {native.describe()}")
    print("forward and forward + backward: ms (times torch.exp)\n")
    print(f"{'case':20} {'n':>3} {'exp':>6}" + "".join(f" | {name:>7} {'':8} {'':17}" for name in backends))
    for name in options.case:
        for n in CASES[name][-1]:
            times = measure(CASES[name], n, backends, options.repeats)
            exp, row = times["exp"], f"{name:20} {n:3} {times['exp']:6.2f}"
            for backend in backends:
                for what in ("forward", "both"):
                    milliseconds = times[f"{backend} {what}"]
                    row += f"{' |' if what == 'forward' else ''} {milliseconds:8.2f} ({milliseconds / exp:6.2f})"
            if len(backends) == 2:
                row += "".join(f"  {times[f'torch {what}'] / times[f'cpu {what}']:5.1f}x"
                               for what in ("forward", "both"))
            print(row, flush=True)


if __name__ == "__main__":
    main()
