"""How far additivity holds: the loss of sets of units as predicted from single units, and as measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from lamamba.compression.calibration import Calibration
from lamamba.compression.plan import in_order, make_plan
from lamamba.compression.scores import Scores, energy_of
from lamamba.compression.units import Removable
from lamamba.options.base import checked
from lamamba.utils.progress import Progress, Report

NOISE = 1.0
"""Standard deviation of the logarithm by which the scores of a "sensible" set are changed before it is planned."""


@checked
@dataclass(frozen=True)
class SetLoss:
    """A set of units: its relative output loss, predicted and measured."""

    kind: str
    """"sensible": planned on scores with noise; "random": units in random order."""
    share: float
    """Of the parameters, removed."""
    predicted: float
    predicted_with_cross_terms: float | None
    measured: float


def relative_loss(
    network: Removable, names: Sequence[str], calibration: Calibration, whole: Sequence[Tensor] | None = None
) -> float:
    """The relative output loss of removing units together, E ||f(x without them) - f(x)||^2 / E ||f(x)||^2.

    Args:
        network: with the units.
        names: of the units.
        calibration: best of samples that no unit was scored on.
        whole: the outputs of the whole network, where they are known.
    """
    whole = calibration.predictions(network.model) if whole is None else whole
    with network.masked(names) as masked:
        outputs = calibration.predictions(masked)
    return relative_distance(outputs, whole)


def relative_distance(outputs: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    """E ||output - whole||^2 / E ||whole||^2 over batches of outputs (b, c, h, w)."""
    return energy_of([a - b for a, b in zip(outputs, whole, strict=True)]) / energy_of(list(whole))


def measure_sets(
    network: Removable, scores: Scores, calibration: Calibration, *, sets: int = 100, first: int = 0,
    max_share: float = 0.6, by: str = "parameters", seed: int = 0, report: Report = lambda progress: None,
) -> Iterator[SetLoss]:
    """Measure sets of units that remove 5 % to max_share, every other one sensible, the rest random.

    Args:
        network, scores: of one network; scores of criterion "output".
        calibration: of samples that no unit was scored on.
        sets: how many.
        first: the number of the first one to measure: a set depends on seed and number alone.
        max_share: the largest share that is removed.
        by: what a share means.
        seed: of shares, noise and order.
    """
    whole = calibration.predictions(network.model) if first < sets else []
    for number in range(first, sets):
        generator, kind = np.random.default_rng((seed, number)), ("sensible", "random")[number % 2]
        share, changed = float(generator.uniform(0.05, max_share)), _changed(scores, kind, generator)
        plan = make_plan(changed, remove=share, by=by) if kind == "sensible" else in_order(changed, share, by)
        with_cross_terms = scores.predicted_with_cross_terms(plan.removed)
        yield SetLoss(
            kind, plan.parameters, scores.predicted(plan.removed) / scores.energy,
            None if with_cross_terms is None else with_cross_terms / scores.energy,
            relative_loss(network, plan.removed, calibration, whole),
        )
        report(Progress("measuring sets", number + 1, sets, unit="sets"))


def _changed(scores: Scores, kind: str, generator: np.random.Generator) -> Scores:
    size = len(scores.values)
    values = scores.values * np.exp(NOISE * generator.standard_normal(size))
    return dataclasses.replace(scores, values=values if kind == "sensible" else generator.random(size))


def rank_correlation(sets: Sequence[SetLoss], *, with_cross_terms: bool = False) -> float:
    """Spearman's rank correlation of predicted and measured losses."""
    predicted: list[Any] = [each.predicted_with_cross_terms if with_cross_terms else each.predicted for each in sets]
    return float(spearmanr(predicted, [each.measured for each in sets]).statistic)
