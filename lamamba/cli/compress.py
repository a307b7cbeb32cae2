"""lamamba compress: half the layers, chosen one by one (LAPTOP-Diff), and healed by distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamamba.cli.parse import parse, show
from lamamba.options.compress import (
    CompareCriteriaOptions,
    CompressOptions,
    PlanRemovalOptions,
    RemoveUnitsOptions,
    ScoreUnitsOptions,
)

DESCRIPTION = """Remove the layers of a network that matter least, and heal it (LAPTOP-Diff, arXiv 2404.11098).

  lamamba compress shipped --remove 0.5 --out half                          half the parameters, no training
  lamamba compress runs/xl --remove 0.5 --heal 20000 --out half             and healed with the network as teacher
  lamamba compress runs/xl --remove 0.4 --by multiply-adds --out faster     parameters are not speed

or step by step:

  lamamba compress score runs/xl --out scores            the output's change without each branch, block, bottleneck
  lamamba compress plan scores --remove 0.5              the exact best set for a budget; predicted and measured loss
  lamamba compress plan scores --max-loss 0.01 --keep bottleneck --out careful.json
  lamamba compress apply scores/plan.json --out half     the pruned network
  lamamba compress compare shipped --reference digits --features digits --out compare    against other criteria

The pruned folder is a model: sample, app, evaluate, export and train --start.source read it. Healing is a training with
a [distill] section (lamamba train --help). Killed at any time, the same command goes on. A U-Net of diffusers is
compressed by examples/compress_unet.py."""

SCORE = "Score every unit of a network, by what changes without it: lamamba compress score runs/xl --out scores"
PLAN = "Find the best set of units to remove, from their scores: lamamba compress plan scores --remove 0.5"
APPLY = "Make the pruned network of a plan: lamamba compress apply scores/plan.json --out half"
COMPARE = "Loss and distance over the removed share by criterion: lamamba compress compare runs/xl --out compare"
STEPS: dict[str, tuple[type[Any], str]] = {
    "score": (ScoreUnitsOptions, SCORE), "plan": (PlanRemovalOptions, PLAN), "apply": (RemoveUnitsOptions, APPLY),
    "compare": (CompareCriteriaOptions, COMPARE),
}


def main(arguments: list[str]) -> None:
    step, *rest = arguments or ["--help"]
    if step in STEPS:
        cls, description = STEPS[step]
        options = parse(cls, rest, f"compress {step}", description)
    else:
        options = parse(CompressOptions, [step, *rest], "compress", DESCRIPTION)

    from lamamba.api.compare_criteria import compare_criteria
    from lamamba.api.compress import compress, plan_removal, remove_units, score_units

    functions: dict[type, Callable[[Any], object]] = {
        ScoreUnitsOptions: score_units, PlanRemovalOptions: plan_removal, RemoveUnitsOptions: remove_units,
        CompareCriteriaOptions: compare_criteria, CompressOptions: compress,
    }
    show(functions[type(options)](options))
