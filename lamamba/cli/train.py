"""lamamba train: a recipe and its overrides become a run."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.base import options
from lamamba.options.training import TrainOptions, recipe_names

DESCRIPTION = f"""Train a network: lamamba train RECIPE [options].

RECIPE is one of {', '.join(recipe_names())}, or a TOML file with the options below (sections as in their names).
Options given here override the recipe's. Running the same command again resumes the run where it was stopped.

  lamamba train digits --out runs/digits
  lamamba train folder --data.source photos/ --data.image-size 64 --out runs/photos
  lamamba train mine.toml --data.source latents/ --data.image-size 256 --out runs/latents    (see lamamba encode)
  lamamba train digits --steps 200 --optimizer.learning-rate 5e-4 --dry-run"""


@options
class TrainArguments(TrainOptions):
    dry_run: bool = False
    """Check everything, print the plan, and stop."""


def main(arguments: list[str]) -> None:
    name, rest = "", arguments
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
    if not name and not {"-h", "--help"} & set(rest):
        known = ", ".join(recipe_names())
        raise ValueError(f"name a recipe first, as in lamamba train digits (known: {known}, or a .toml file)")
    default = TrainArguments.from_recipe(name) if name else TrainArguments()
    chosen = parse(TrainArguments, rest, f"train {name or 'RECIPE'}", DESCRIPTION, default)

    from lamamba.api.train import plan, train
    from lamamba.utils.distributed import end_processes, is_rank_zero

    if chosen.dry_run:
        if is_rank_zero():
            print(plan(chosen))
        return
    try:
        result = train(chosen)
    finally:
        end_processes()
    if is_rank_zero():
        print(result)
