r"""Train the digits recipe for a while and keep its loss, to compare devices and precisions.

    python benchmarks/train_digits.py --device cpu --json benchmarks/results/digits-cpu.json
    python benchmarks/train_digits.py --device cuda --dtype bfloat16 --seconds 120 \
        --against benchmarks/results/digits-cpu.json

Every random number of a sample follows from the seed and the sample's position in the run, so that two runs see the
same noise, times and labels at every step, whatever the device: their losses may be compared step by step. bfloat16 is
autocast over float32 weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lamamba.data.digits import Digits
from lamamba.options.training import load_recipe
from lamamba.training.loop import StepState, train

WINDOW = 100
"""Steps whose losses are averaged: single ones are noisy."""
MAX_DIFFERENCE = 0.03
"""Of the losses' means over a window, relative; two seeds differ by about as much."""


class Enough(Exception):
    """The time is up."""


def losses_of_a_run(device: str, dtype: str, steps: int | None, seconds: float) -> tuple[list[float], float]:
    """The loss of every step made within the time, and the seconds it took."""
    config = load_recipe("digits")
    config = dataclasses.replace(
        config, device=device, steps=steps or config.steps, checkpoint_every=10**9,
        sampling=dataclasses.replace(config.sampling, every=0),
    )
    losses: list[float] = []
    began = time.perf_counter()

    def watch(step_state: StepState) -> None:
        losses.append(step_state.loss)
        if time.perf_counter() - began > seconds:
            raise Enough

    # around the whole loop, so it must not keep the weights that it has rounded
    mixed = torch.autocast(device.split(":")[0], getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=False)
    with tempfile.TemporaryDirectory() as folder, mixed, contextlib.suppress(Enough):
        train(config, Digits(config.data.image_size), Path(folder) / "run", [watch])
    return losses, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, wherever the run is")
    parser.add_argument("--against", type=Path, help="a file that this script wrote, whose losses must be reached")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    losses, seconds = losses_of_a_run(options.device, options.dtype, options.steps, options.seconds)
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, len(losses) - WINDOW + 1, WINDOW)]
    result = {
        "device": options.device, "dtype": options.dtype, "torch": torch.__version__, "steps": len(losses),
        "seconds": round(seconds, 1), "window": WINDOW, "mean_losses": [round(mean, 5) for mean in means],
    }
    print(f"{len(losses)} steps in {seconds:.0f} s; mean loss of each {WINDOW} steps: "
          + " ".join(f"{mean:.4f}" for mean in means))
    if options.against:
        expected = json.loads(options.against.read_text(encoding="utf-8"))["mean_losses"][: len(means)]
        if not expected:
            raise SystemExit(f"fewer than {WINDOW} steps were made: nothing to compare")
        last = means[len(expected) - 1]
        result |= {"expected_losses": expected, "difference": last / expected[-1] - 1,
                   "reached": last <= expected[-1] * (1 + MAX_DIFFERENCE)}
        print(f"expected {expected[-1]:.4f} at step {len(expected) * WINDOW}, got {last:.4f}: "
              + ("reached" if result["reached"] else "NOT reached"))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result.get("reached", True):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
