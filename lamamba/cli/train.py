"""lamamba train: a recipe and its overrides become a run."""

from __future__ import annotations

from typing import Annotated

from lamamba.cli.parse import parse, show
from lamamba.options.base import Ge, joint_checks_later, options
from lamamba.options.scaling import SimulateOptions
from lamamba.options.training import recipe_names

DESCRIPTION = f"""Train a network: lamamba train RECIPE [options].

RECIPE is one of {', '.join(recipe_names())}, or a TOML file with the options below (sections as in their names).
Options given here override the recipe's. Running the same command again resumes the run where it was stopped.

  lamamba train digits --out runs/digits
  lamamba train folder --data.source photos/ --data.image-size 64 --out runs/photos
  lamamba train mine.toml --data.source latents/ --data.image-size 256 --out runs/latents    (see lamamba encode)
  lamamba train digits --steps 200 --optimizer.learning-rate 5e-4 --dry-run
  lamamba train xl_256 --dry-run --world-size 64 --device h200                (simulated, as none is here)"""


@options
class TrainArguments(SimulateOptions):
    dry_run: bool = False
    """Check everything, print the plan, and stop."""
    world_size: Annotated[int, Ge(0)] = 0
    """With dry_run: simulate a step on so many devices, of the kind that --device names (a100, h100, h200 or b200)."""


def main(arguments: list[str]) -> None:
    name, rest = "", arguments
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
    if not name and not {"-h", "--help"} & set(rest):
        known = ", ".join(recipe_names())
        raise ValueError(f"name a recipe first, as in lamamba train digits (known: {known}, or a .toml file)")
    with joint_checks_later():                                                  # options may mend a clash
        default = TrainArguments.from_recipe(name) if name else TrainArguments()
    chosen = parse(TrainArguments, rest, f"train {name or 'RECIPE'}", DESCRIPTION, default)

    if chosen.world_size and not chosen.dry_run:
        raise ValueError("--world-size is for --dry-run; the number of processes that train comes from the launcher")
    from lamamba.api.train import plan, train
    from lamamba.utils.distributed import end_processes, is_rank_zero

    if chosen.dry_run:
        if chosen.world_size:
            from lamamba.api.simulate import simulate

            print(simulate(chosen))
        elif is_rank_zero():
            print(plan(chosen))
        return
    try:
        result = train(chosen)
    finally:
        end_processes()
    show(result)
