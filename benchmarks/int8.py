"""Products in int8 against packed bfloat16 on this CPU: a pass of the network side by side, and the output's error.

    python benchmarks/int8.py [--preset xl] [--image-size 256] [--images 2] [--json benchmarks/results/int8.json]

Random weights; the two networks take turns. Seconds are processor time, medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.timing import medians
from lamamba.benchmarking.environment import commit, device_name, versions
from lamamba.config import UNetConfig
from lamamba.inference.packing import pack_weights
from lamamba.inference.quantizing import quantize
from lamamba.models.unet import LaMambaUNet
from lamamba.options.base import Quantization
from lamamba.runs.model import move

KINDS: tuple[Quantization | None, ...] = (None, "int8-dynamic")


def build(config: UNetConfig, kind: Quantization | None, rows: int) -> LaMambaUNet:
    """The same random weights for every kind; zeros (gates, head) are drawn, too, so that every branch counts."""
    torch.manual_seed(0)
    network = LaMambaUNet(config).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    move(network, torch.device("cpu"), torch.bfloat16)
    if kind:
        quantize(network, kind)
    pack_weights(network, rows)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xl")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    config = UNetConfig.preset(chosen.preset, image_size=chosen.image_size)
    height, width = config.input_size
    networks = [build(config, kind, chosen.images * height * width // config.patch_size**2) for kind in KINDS]
    inputs = (torch.randn(chosen.images, config.in_channels, height, width).to(torch.bfloat16),
              torch.full((chosen.images,), 500.0), torch.arange(chosen.images))
    with torch.no_grad():
        expected, found = (network(*inputs).float() for network in networks)
        passes = {str(kind): functools.partial(network, *inputs) for kind, network in zip(KINDS, networks, strict=True)}
        bfloat16, int8 = medians(passes, chosen.repeats, time.process_time).values()
    result = {
        "preset": chosen.preset, "image_size": chosen.image_size, "images": chosen.images, "threads": chosen.threads,
        "seconds": {"bfloat16": bfloat16, "int8-dynamic": int8}, "ratio": bfloat16 / int8,
        "error": float((found - expected).norm() / expected.norm()),
        "device": device_name("cpu"), "versions": versions("diffusers"), "commit": commit(),
    }
    print(f"bfloat16 {bfloat16:.3f} s, int8-dynamic {int8:.3f} s: {bfloat16 / int8:.2f} times as fast, "
          f"error {result['error']:.1%}")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
