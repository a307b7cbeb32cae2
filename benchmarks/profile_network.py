"""CPU time of a network by kind of operation, beside the lower bound of its matrix products.

    python benchmarks/profile_network.py --models xl dit-xl-2 --image-size 256 --batch 8 --dtype bfloat16

The bound is the time of the network's multiply-adds at the speed of the large matrix product of `lamamba bench`, packed
as it is, measured in the same run. The scan's is that of its exponentials (benchmarks/scan_cpu.py).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from timing import keep_freed_memory, medians
from torch.profiler import ProfilerActivity, profile

from lamamba.benchmarking.throughput import Case, build, inputs
from lamamba.inference.packing import pack_weights

KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise", "aten::mkldnn_linear"),
    "scan": ("lamamba::selective_scan",),
    "attention": ("lamamba::window_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
                  "aten::_scaled_dot_product_attention_math"),
    "norms and gates": ("lamamba::modulated_norm", "lamamba::gated_norm", "aten::native_layer_norm", "aten::addcmul"),
    "GELU": ("aten::gelu",),
    "convolutions": ("lamamba::local_mixing", "aten::mkldnn_convolution", "aten::_conv_depthwise2d",
                     "aten::thnn_conv2d", "aten::slow_conv2d_forward", "aten::_slow_conv2d_forward"),
    "adaLN products of few rows": ("lamamba::few_rows_linear",),
    "additions, multiplications": ("aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::silu"),
    "copies": ("aten::copy_", "aten::cat"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


def profiled(case: Case, passes: int) -> tuple[float, dict[str, float]]:
    """Median milliseconds of a forward pass without the profiler, and those of each kind of operation under it."""
    device = torch.device(case.device)
    torch.manual_seed(0)
    model = build(case).eval()
    if case.packs_weights:
        pack_weights(model, case.tokens * case.batch)
    arguments = inputs(case, device)
    with torch.no_grad():
        seconds = medians({case.model: lambda: model(*arguments)}, passes)[case.model]
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            for _ in range(passes):
                model(*arguments)
    kinds: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        kinds[KIND_OF.get(event.key, "everything else")] += event.self_cpu_time_total / 1000 / passes
    return 1000 * seconds, dict(kinds)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description="CPU time of a network by kind of operation")
    parser.add_argument("--models", nargs="+", default=["xl", "dit-xl-2"])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    cases = [Case(name, options.image_size, options.batch, options.dtype, "cpu", "forward") for name in options.models]
    large = cases[0].product()
    speed = 1000 * large.multiply_adds / profiled(large, 7)[0]
    print(f"{options.dtype}: {speed / 1e9:.0f} G multiply-adds a second in one large product")
    found = {"dtype": options.dtype, "multiply_adds_per_second": speed, "networks": {}}
    for case in cases:
        ms, kinds = profiled(case, options.passes)
        total, floor = sum(kinds.values()), 1000 * case.multiply_adds / speed
        print(f"\n{case.model}, {options.image_size} px, batch {options.batch}: {ms:.0f} ms a pass; its "
              f"{case.multiply_adds / 1e9:.0f} G multiply-adds alone would take {floor:.0f} ms")
        for kind, share in sorted(kinds.items(), key=lambda item: -item[1]):
            print(f"  {kind:<28} {share:8.1f} ms {share / total:6.1%}")
        found["networks"][case.model] = {"ms": ms, "floor_ms": floor, "kinds_ms": kinds}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
