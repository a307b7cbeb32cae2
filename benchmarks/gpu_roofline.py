"""Estimated time of a forward pass of LaMamba-XL and DiT-XL/2 on an H100 and an H200; arithmetic, nothing is measured.

    python benchmarks/gpu_roofline.py [--compiled FILE] [--json FILE]

bfloat16 inference, conditioning computed ahead. Each kernel takes the longest of what it must do:

    products    2 operations for each multiply-add, at PRODUCTS of the data sheet's rate, or their bytes
    memory      bytes in and out of every other kernel, at MEMORY of the data sheet's rate
    scan        its bytes; its instructions, 128 lanes of a multiprocessor a cycle at ISSUE; its special functions, 16

Instructions and special functions of the scan for each element come from its machine code: from the JSON of
benchmarks/gpu_compile.py, or compiled now. Launches cost nothing here, nor do uneven last waves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_compile
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lamamba.benchmarking.peers.dit import SIZES
from lamamba.benchmarking.scaling import DEVICES, Device
from lamamba.config import UNetConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.ops import layers, use_backend

IMAGES = {256: 64, 512: 16, 1024: 4, 2048: 1}
"""Images of a batch by their size: the same number of tokens."""
PRODUCTS, MEMORY, ISSUE = 0.75, 0.9, 0.8
"""Assumed shares of the device's rates; large copies and products are known to reach 0.9 and 0.8."""
LANES, SPECIAL_LANES = 128, 16
"""Of a multiprocessor, each cycle."""
BYTES = 2
PARTIAL_OUTPUTS = 4
"""Outputs that the directions of a scan write, and another kernel adds."""
DIT_ELEMENTWISE = 8 + 8 + 16
"""Bytes for each number of DiT's tokens in a block when it is compiled: twice residual sum, norm and modulation in one
kernel (two tensors in, two out), and GELU over four times the channels, which no product takes in."""


@dataclass(frozen=True)
class Work:
    """What a kernel does."""

    kind: str
    """products, memory or scan."""
    bytes: float
    operations: float = 0
    instructions: float = 0
    """Of one lane, summed."""
    special: float = 0

    def seconds(self, device: Device) -> float:
        lanes = device.multiprocessors * device.clock
        return max(
            self.bytes / (MEMORY * device.bandwidth), self.operations / (PRODUCTS * device.bfloat16),
            self.instructions / (ISSUE * LANES * lanes), self.special / (SPECIAL_LANES * lanes),
        )


def scan_counts(rows: list[dict[str, Any]] | None) -> dict[int, tuple[float, float]]:
    """Instructions and special functions of the forward scan for each element, by its channels.

    Args:
        rows: of benchmarks/gpu_compile.py; None: compile it now.
    """
    stages = [case for case in gpu_compile.CASES
              if case.n == 1 and case.dtype == case.weights == "bfloat16"]
    if rows is None:
        rows = []
        for case in stages:
            def add(
                kernel: Any, compiled: Any, seconds: float, elements: int, case: gpu_compile.Case = case
            ) -> None:
                rows.append({"launch": "scan", "arch": 90, "case": str(case),
                             **gpu_compile.resources(compiled, case.n, elements)})

            with gpu_compile.compiling(90, add):
                next(gpu_compile.launches(case, 64, 1))[1]()
    found = {}
    for case in stages:
        walks = [row for row in rows if row["launch"] == "scan" and row["arch"] == 90 and row["case"] == str(case)
                 and row["instructions"]]
        if not walks:
            raise ValueError(f"no scan of {case} for sm_90 in these rows: run gpu_compile.py without --quick")
        found[case.channels] = tuple(sum(row[key] for row in walks) / len(walks) for key in ("instructions", "special"))
    return found


class Kernels(TorchDispatchMode):
    """Context manager that notes what each operation on meta tensors would do on a GPU.

    Args:
        counts: see `scan_counts`.
    """

    def __init__(self, counts: dict[int, tuple[float, float]]):
        super().__init__()
        self._counts = counts
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, packet = func(*args, **(kwargs or {})), func.overloadpacket
        name = packet.__name__
        if func.is_view or "empty" in name or name in ("detach", "_unsafe_view"):
            return output
        moved = sum(x.nbytes for x in tree_leaves((args, kwargs, output)) if isinstance(x, Tensor))
        if name == "gpu_scan_gated_norm":
            self._scan(*args)
        elif packet in flop_registry and name != "gpu_local_mixing":
            operations = flop_registry[packet](*args, **(kwargs or {}), out_val=output)
            self.work.append(Work("products", moved, operations))
        else:
            self.work.append(Work("memory", moved))
        return output

    def _scan(self, x: Tensor, z: Tensor, dt: Tensor, B: Tensor, C: Tensor, *rest: Any) -> None:
        elements = x.numel() * dt.shape[2]
        instructions, special = self._counts[x.shape[3]]
        parts = PARTIAL_OUTPUTS * x.nbytes
        read = sum(tensor.nbytes for tensor in (x, dt, B, C))
        self.work.append(Work("scan", read + parts, 0, elements * instructions, elements * special))
        self.work.append(Work("memory", parts + 3 * x.nbytes))                  # the sum, its norm and gate


def lamamba(image_size: int, images: int, counts: dict[int, tuple[float, float]]) -> list[Work]:
    """The kernels of LaMamba-XL."""
    config = UNetConfig.preset("xl", image_size=image_size)
    with torch.device("meta"):
        model = LaMambaUNet(config).eval()
        nn.Module.to(model, torch.bfloat16)                                     # diffusers' own says more
        x = torch.empty(images, config.in_channels, *config.input_size, dtype=torch.bfloat16)
        conditioning = torch.empty(images, model.condition_outputs, dtype=torch.bfloat16)
    on_gpu = mock.patch.object(layers, "_runs_on_gpu", return_value=True)
    with on_gpu, use_backend("triton"), torch.no_grad(), Kernels(counts) as kernels:
        model(x, None, conditioning=conditioning)
    return kernels.work


def dit(image_size: int, images: int) -> list[Work]:
    """The kernels of DiT-XL/2, compiled, with attention in one kernel."""
    size, l = SIZES["xl"], (image_size // 16) ** 2
    c, rows = size.width, images * l
    block = [
        Work("products", BYTES * (rows * (k + m) + k * m), 2 * rows * k * m)
        for k, m in ((c, 3 * c), (c, c), (c, 4 * c), (4 * c, c))
    ]
    block += [Work("products", BYTES * 4 * rows * c, 4 * rows * l * c), Work("memory", DIT_ELEMENTWISE * rows * c)]
    return block * size.depth


def estimate(image_size: int, device: Device, counts: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds of a batch by kind, for both networks."""
    images, found = IMAGES[image_size], {}
    for name, work in (("lamamba", lamamba(image_size, images, counts)), ("dit", dit(image_size, images))):
        times: Counter[str] = Counter()
        for kernel in work:
            times[kernel.kind] += 1000 * kernel.seconds(device)
        found[name] = {**times, "ms": times.total(), "kernels": len(work)}
    return {"image_size": image_size, "images": images, **found, "ratio": found["dit"]["ms"] / found["lamamba"]["ms"]}


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| GPU | px | images | LaMamba-XL: products | memory | scan | all, ms | DiT-XL/2: products | memory | all, ms "
        "| LaMamba is faster by |", "|" + "---|" * 11,
    ]
    for row in rows:
        ours, theirs = row["lamamba"], row["dit"]
        lines.append(
            f"| {row['device'].upper()} | {row['image_size']} | {row['images']} | {ours['products']:.1f} | "
            f"{ours['memory']:.1f} | {ours['scan']:.1f} | {ours['ms']:.1f} | {theirs['products']:.1f} | "
            f"{theirs['memory']:.1f} | {theirs['ms']:.1f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", type=Path, help="the JSON of gpu_compile.py")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compiled = json.loads(options.compiled.read_text(encoding="utf-8"))["rows"] if options.compiled else None
    counts = scan_counts(compiled)
    for channels, (instructions, special) in counts.items():
        print(f"scan, {channels} channels: {instructions:.0f} instructions, {special:.0f} special functions an element")
    for name in ("h100", "h200"):
        device = DEVICES[name]
        print(f"{name.upper()}: {PRODUCTS:.0%} of {device.bfloat16 / 1e12:.0f} TFLOP/s, {MEMORY:.0%} of "
              f"{device.bandwidth / 1e12:.2f} TB/s, {ISSUE:.0%} of "
              f"{LANES * device.multiprocessors * device.clock / 1e12:.1f} T lane instructions/s, "
              f"{SPECIAL_LANES * device.multiprocessors * device.clock / 1e12:.1f} T special functions/s")
    rows = [{"device": name, **estimate(size, DEVICES[name], counts)} for name in ("h100", "h200") for size in IMAGES]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"scan": counts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
