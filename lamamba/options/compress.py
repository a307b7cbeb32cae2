"""Options of `lamamba.compress` and its steps: score_units, plan_removal, remove_units, compare_criteria."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamamba.options.base import Above0, FilePath, Ge, Gt, Le, Name, Numbers, Positive, Words, options

Criterion = Literal["output", "task", "magnitude", "random", "hand"]
By = Literal["parameters", "multiply-adds", "time"]
Share = Annotated[float, Gt(0), Le(1)]
Model = Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@options
class CalibrationOptions:
    """The samples on which a network is compared with what is left of it."""

    data: Name | None = None
    """"digits", a folder of images, latents: as in training. By default what a run was trained on; "sampling": states
    of the network's own sampling, where there is no data."""
    samples: Annotated[int, Ge(2), Le(10**7)] = 512
    """How many."""
    times: Annotated[Numbers, tyro.conf.arg(metavar="LOW,HIGH")] = (0.0, 1000.0)
    """Range of the timesteps, 0 clean .. 1000 noise, drawn evenly. 700,1000 weighs what decides the class."""
    seed: Annotated[int, Ge(0)] = 0
    """Of order, noise, times and dropped labels."""
    batch_size: Positive = 64
    """Samples at a time."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device such as cpu or cuda:1."""

    def __post_init__(self) -> None:
        if len(self.times) != 2 or not 0 <= self.times[0] < self.times[1] <= 1000:
            raise ValueError(f"times={self.times} must be a lower and a higher timestep of 0 to 1000, as in 700,1000")


@options
class ScoreUnitsOptions(CalibrationOptions):
    """What to score, by which criterion, on which samples."""

    model: Model
    """Run, checkpoint, saved model, or "shipped" (the digits model of the package)."""
    out: FilePath = Path("scores")
    """Folder for scores.json and units.png."""
    criterion: Criterion = "output"
    """output: change of the output (LAPTOP-Diff); task: change of the training loss; magnitude: squared weights;
    random; hand: last blocks of the stages first."""


@options
class BudgetOptions:
    """How much to remove, or how much loss to allow."""

    remove: Share | None = None
    """Share to remove at least, with the least loss: 0.5 removes half."""
    max_loss: Annotated[float, Ge(0)] | None = None
    """Relative output loss to allow, and remove the most; in place of remove."""
    by: By = "parameters"
    """What a share is of: parameters, multiply-adds, or time measured here unit by unit."""
    keep: Words = ()
    """Units that stay, or all of a stage: decoder.3,bottleneck"""


@options
class PlanRemovalOptions(BudgetOptions):
    """Scores, budget, and where the plan goes."""

    scores: Annotated[FilePath, tyro.conf.Positional, tyro.conf.arg(metavar="SCORES")]
    """scores.json, or its folder."""
    out: FilePath | None = None
    """The plan; by default plan.json beside the scores."""
    measure: bool = True
    """Measure the set's loss on samples that no unit was scored on."""
    model: Name | None = None
    """The network; by default the one that was scored, at its place of then."""
    data: Name | None = None
    """For measuring; by default what the units were scored on."""
    device: str = "auto"
    """For measuring: "auto", or a PyTorch device."""


@options
class RemoveUnitsOptions:
    """A plan, and where the pruned network goes."""

    plan: Annotated[FilePath, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")]
    """plan.json, or its folder."""
    out: FilePath
    """Folder of the pruned network."""
    model: Name | None = None
    """The network; by default the one that was scored."""


@options
class CompareCriteriaOptions(CalibrationOptions):
    """Which criteria to compare, at which shares, by what."""

    model: Model
    """Run, checkpoint, saved model, or "shipped"."""
    out: FilePath = Path("compare")
    """Folder for compare.json, criteria.png and additivity.png; what is there is not measured again."""
    criteria: tuple[Criterion, ...] = ("output", "task", "magnitude", "hand", "random")
    """Criteria to compare."""
    shares: Numbers = (0.3, 0.5, 0.6, 0.7, 0.8)
    """Shares of the parameters to remove."""
    random_draws: Annotated[int, Ge(1), Le(1000)] = 10
    """Draws of the criterion "random" at each share."""
    sets: Annotated[int, Ge(0), Le(100_000)] = 200
    """Sets of units to measure, half of them sensible, half random: how far additivity holds. 0: none."""
    reference: Name | None = None
    """Statistics that samples are compared with, as in lamamba evaluate ("digits"); None: the loss alone."""
    num_images: Annotated[int, Ge(2)] = 1000
    """Samples of each pruned network, at guidance 1."""
    repeats: Positive = 1
    """Seed ranges of the samples, one after the other."""
    features: str = "inception"
    """The feature network, as in lamamba evaluate: inception, dinov2, digits, module:name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(f"shares={self.shares} must lie between 0 and 1")


@options
class CompressOptions(CalibrationOptions, BudgetOptions):
    """The whole way: score, plan, remove and, where wanted, heal."""

    model: Model
    """Run, checkpoint, saved model, or "shipped"."""
    out: FilePath
    """Folder: scores.json, plan.json, units.png, pruned/ (the network), healed/ (the training run)."""
    heal: Annotated[int, Ge(0)] = 0
    """Optimizer steps of healing: training with the whole network as teacher (normalised features). 0: none."""
    heal_batch_size: Positive = 64
    """Images per step of healing."""
    heal_learning_rate: Above0 | None = None
    """Highest learning rate of healing; by default that of the network's own training."""
