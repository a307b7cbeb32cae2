"""Time of a guided sampling step, with and without conditioning computed ahead.

    python benchmarks/sampling_step.py [--model xl] [--image-size 256] [--batches 1 8] [--dtype float32] [--device cpu]

"plain" calls the network with timesteps and labels; "ahead" first computes the conditioning of all steps (on a GPU,
small batches are also replayed as a CUDA graph). Medians of whole runs of --steps steps, in alternation, divided by the
steps.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from timing import keep_freed_memory, medians

from lamamba.benchmarking.throughput import Case, build
from lamamba.diffusion.guidance import guided
from lamamba.inference.conditioning import ConditionedNetwork
from lamamba.inference.packing import pack_weights


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description="Time of a guided sampling step")
    parser.add_argument("--model", default="xl")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    case = Case(options.model, options.image_size, 1, options.dtype, options.device, "forward")
    torch.manual_seed(0)
    model = build(case).eval()
    if case.packs_weights:
        pack_weights(model, case.tokens * 2 * max(options.batches))
    times, found = torch.linspace(999, 0, options.steps).tolist(), []
    for batch in options.batches:
        labels = torch.arange(batch, device=device) % model.architecture.num_classes
        null = model.architecture.num_classes
        x = torch.randn(batch, 4, *model.architecture.input_size, device=device, dtype=dtype)

        def run(
            kind: str, labels: torch.Tensor = labels, null: int = null, x: torch.Tensor = x, batch: int = batch
        ) -> None:
            network = ConditionedNetwork(model, times, [*labels.tolist(), null]) if kind == "ahead" else model
            predict = guided(network, labels, 4.0, null)
            for t in times:
                predict(x, torch.full((batch,), t))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        with torch.no_grad():
            seconds = medians({kind: functools.partial(run, kind) for kind in ("plain", "ahead")}, options.runs)
        plain, ahead = (1000 * each / options.steps for each in seconds.values())
        print(f"{options.model} {options.image_size} px {options.dtype}, {batch} guided: {plain:.1f} ms a step plain, "
              f"{ahead:.1f} ms with conditioning made ahead ({plain / ahead:.2f} times as fast)", flush=True)
        found.append({"batch": batch, "plain_ms": plain, "ahead_ms": ahead})
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
