"""All figures of a set of samples beside a reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lamamba.evaluation.extraction import REQUESTED, Features
from lamamba.evaluation.reference import Moments, Reference
from lamamba.metrics.frechet import frechet_distance
from lamamba.metrics.neighbours import density_coverage, precision_recall
from lamamba.metrics.scores import inception_score, kernel_distance, softmax
from lamamba.metrics.statistics import Statistics
from lamamba.options.metrics import Settings

Figures = dict[str, float]


def moments(statistics: Statistics) -> Moments:
    return statistics.mean, statistics.covariance()


def judge(
    samples: Features, statistics: dict[str, Statistics], reference: Reference, settings: Settings,
    *, has_class_logits: bool = False, on_progress: Callable[[str, float], None] | None = None,
) -> Figures:
    """Every figure that these samples and this reference allow.

    Args:
        samples: features on disk.
        statistics: of "features", and of "spatial" where there are some; of all processes.
        reference: must fit (`Reference.check`).
        has_class_logits: the network's logits are of the classes that images were asked to show.
        on_progress: told what is being computed and the share done.

    Returns:
        By name: frechet, frechet_spatial, inception_score and its spread over splits, precision, recall, density,
        coverage, kernel and its spread over subsets, accuracy. Those that need what is missing are left out.
    """
    tell = on_progress or (lambda what, share: None)
    names = samples.names()
    tell("distances of distributions", 0)
    figures = {"frechet": frechet_distance(*moments(statistics["features"]), *reference.features)}
    if reference.spatial is not None and "spatial" in statistics:
        figures["frechet_spatial"] = frechet_distance(*moments(statistics["spatial"]), *reference.spatial)
    if "logits" in names:
        logits = samples.rows("logits")
        figures["inception_score"], spread = inception_score(softmax(logits), settings.split)
        if len(logits) > settings.split:                                        # one split has no spread
            figures["inception_score_spread"] = spread
        if REQUESTED in names and has_class_logits:
            figures["accuracy"] = float((logits.argmax(axis=1) == samples.rows(REQUESTED)).mean())
    if reference.rows is None:
        return figures
    rows, mine = reference.rows, samples.rows()
    fewest = min(len(rows), len(mine))
    if fewest > settings.neighbours:
        figures["precision"], figures["recall"] = precision_recall(
            rows, mine, settings.neighbours, lambda share: tell("precision and recall", share)
        )
    if fewest > settings.density_neighbours:
        figures["density"], figures["coverage"] = density_coverage(
            rows, mine, settings.density_neighbours, lambda share: tell("density and coverage", share)
        )
    tell("kernel distance", 0)
    figures["kernel"], figures["kernel_spread"] = kernel_distance(
        rows, mine, min(settings.kernel_subset, fewest), settings.kernel_subsets, settings.kernel_seed
    )
    return figures


def mean_and_spread(runs: list[Figures]) -> tuple[Figures, Figures]:
    """Mean and standard deviation (of a sample: n - 1) of figures over repetitions; no spread of one."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    means = {name: float(np.mean([run[name] for run in runs])) for name in names}
    spreads = {name: float(np.std([run[name] for run in runs], ddof=1)) for name in names} if len(runs) > 1 else {}
    return means, spreads
