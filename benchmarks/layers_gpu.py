"""Time of the Triton layers on this GPU, beside the formula in eager PyTorch and under torch.compile.

    python benchmarks/layers_gpu.py [--quick] [--seconds 40] [--json FILE]

bfloat16, batch 64 at 256 pixels, the stages of LaMamba-XL; milliseconds. "backward" is a forward and a backward pass
minus a forward pass. "bytes" is the time of the kernel's memory traffic (docs/gpu-layers.md) at 4.3 TB/s, the copy rate
of an H200, or another given as an option. Compiling takes seconds per layer, so only the first stage is compiled, until
the time limit; what was measured by then is in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from scan_gpu import DEVICE, device_name, milliseconds

from lamamba.models.geometry import make_geometry
from lamamba.ops import layers, use_backend
from lamamba.ops.layers import reference
from lamamba.utils.files import write_atomically

IMAGES = 64
STAGES = ((32, 320), (16, 640), (8, 1280))
"""Side of the grid and channels of a block; the scans inside have twice as many."""
NUM_HEADS, WINDOW = 16, (8, 8)
BYTES = {
    "modulated_norm": (4, 6), "gated_norm": (6, 10), "gated_sum": (6, 6), "local_mixing": (4, 10),
    "window_attention": (8, 14), "window_attention, shifted": (8, 14),
}
"""Bytes per number of the output, forward and backward, without the sums for vectors."""


def make_inputs(name: str, side: int, width: int, images: int = IMAGES) -> tuple:
    """A layer's inputs as in a network; all floating-point ones require gradients."""
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.requires_grad_()

    tokens, inner = (images, side, side, width), (images, side, side, 2 * width)
    shift, scale, gate = (leaf(part) for part in normal(images, 3 * width).chunk(3, dim=-1))
    if name == "modulated_norm":
        return leaf(normal(*tokens)), leaf(normal(width)), leaf(normal(width)), shift, scale, 1e-5
    if name == "gated_sum":
        return leaf(normal(*tokens)), leaf(normal(*tokens)), gate
    x, z = (leaf(part) for part in normal(*inner[:3], 4 * width).chunk(2, dim=-1))
    if name == "gated_norm":
        return leaf(normal(*inner)), z, leaf(normal(2 * width)), leaf(normal(2 * width)), 1e-5
    if name == "local_mixing":
        return x, leaf(normal(2 * width, 1, 3, 3))
    geometry = make_geometry((side, side), WINDOW, "continuous").to(DEVICE)
    mask, shift_by = (geometry.shifted_mask, geometry.shift) if "shifted" in name else (geometry.mask, (0, 0))
    pairs = WINDOW[0] * WINDOW[1]
    bias = leaf(normal(NUM_HEADS, pairs, pairs))
    return leaf(normal(*tokens[:3], 3 * width)), bias, mask, NUM_HEADS, WINDOW, shift_by


def measure(function: Any, inputs: tuple, repeats: int) -> tuple[float, float]:
    """Milliseconds of a forward pass without gradients, and of a backward pass."""
    differentiable = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    grad_y = torch.randn_like(function(*inputs))
    with torch.no_grad():
        forward = milliseconds(lambda: function(*inputs), repeats)
    both = milliseconds(lambda: torch.autograd.grad(function(*inputs), differentiable, grad_y), repeats)
    return forward, both - milliseconds(lambda: function(*inputs), repeats)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first stage only")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU too (with TRITON_INTERPRET=1)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=40, help="after which nothing more is compiled")
    parser.add_argument("--terabytes", type=float, default=4.3, help="copying, TB/s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.dry_run:
        raise SystemExit("no CUDA device here: nothing to time")
    return options


def main() -> None:
    options = parse()
    stages, images = STAGES[: 1 if options.quick else None], IMAGES
    if options.dry_run:
        stages, images, options.repeats = ((8, 64),), 1, 1
    began, rows = time.perf_counter(), []
    print(f"{device_name()}, torch {torch.__version__}; bytes for {options.terabytes} TB/s")
    print(f"{'layer':26} {'side':>4} {'c':>5} {'way':9} {'forward':>8} {'bytes':>7} {'backward':>8} {'bytes':>7}")
    cases = [(name, side, width, way) for way in ("kernel", "eager") for side, width in stages for name in BYTES]
    cases += [(name, side, width, "compiled") for side, width in stages[:1] for name in BYTES]
    for name, side, width, way in cases:
        if way == "compiled" and time.perf_counter() - began > options.seconds:
            continue
        layer, inputs = name.partition(",")[0], make_inputs(name, side, width, images)
        formula = getattr(reference, layer)
        function = {"kernel": getattr(layers, layer), "eager": formula}.get(way) or torch.compile(formula)
        with use_backend("triton" if way == "kernel" else "torch"):
            forward, backward = measure(function, inputs, options.repeats)
        channels = width * (2 if layer in ("gated_norm", "local_mixing") else 1)
        bounds = [1000 * images * side * side * channels * size / (options.terabytes * 1e12) for size in BYTES[name]]
        print(f"{name:26} {side:4} {channels:5} {way:9} {forward:8.3f} {bounds[0]:7.3f} {backward:8.3f} "
              f"{bounds[1]:7.3f}", flush=True)
        rows.append({"layer": name, "b": images, "side": side, "c": channels, "way": way, "forward_ms": forward,
                     "backward_ms": backward, "forward_bytes_ms": bounds[0], "backward_bytes_ms": bounds[1]})
        if options.json:
            result = {"device": device_name(), "rows": rows}
            write_atomically(options.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
