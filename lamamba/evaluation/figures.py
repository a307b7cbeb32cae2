"""All figures of a set of samples against a reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lamamba.evaluation.extraction import REQUESTED, Features
from lamamba.evaluation.reference import Moments, Reference
from lamamba.metrics.frechet import frechet_distance
from lamamba.metrics.neighbours import density_coverage, precision_recall
from lamamba.metrics.scores import inception_score, kernel_distance, softmax
from lamamba.metrics.statistics import Statistics
from lamamba.options.metrics import MetricOptions

Figures = dict[str, float]


def moments(statistics: Statistics) -> Moments:
    """Mean and covariance."""
    return statistics.mean, statistics.covariance()


def compute_figures(
    samples: Features, statistics: dict[str, Statistics], reference: Reference, options: MetricOptions,
    *, has_class_logits: bool = False, on_progress: Callable[[str, float], None] | None = None,
) -> Figures:
    """Compute every figure that these samples and this reference allow.

    Args:
        samples: features on disk.
        statistics: of "features", and of "spatial" where there are any; over all processes.
        reference: must fit (`Reference.check`).
        options: neighbours, subsets and splits.
        has_class_logits: the network's logits are over the classes that images are conditioned on.
        on_progress: called with the name of the computation and the share done, 0 .. 1.

    Returns:
        By name: frechet, frechet_spatial, inception_score and its spread over splits, precision, recall, density,
        coverage, kernel and its spread over subsets, accuracy. Without those whose inputs are missing.
    """
    report = on_progress or (lambda task, share: None)
    names = samples.names()
    report("distances of distributions", 0)
    figures = {"frechet": frechet_distance(*moments(statistics["features"]), *reference.features)}
    if reference.spatial is not None and "spatial" in statistics:
        figures["frechet_spatial"] = frechet_distance(*moments(statistics["spatial"]), *reference.spatial)
    if "logits" in names:
        logits = samples.rows("logits")
        figures["inception_score"], spread = inception_score(softmax(logits), options.split)
        if len(logits) > options.split:                                         # one split has no spread
            figures["inception_score_spread"] = spread
        if REQUESTED in names and has_class_logits:
            figures["accuracy"] = float((logits.argmax(axis=1) == samples.rows(REQUESTED)).mean())
    if reference.rows is None:
        return figures
    real, fake = reference.rows, samples.rows()
    fewest = min(len(real), len(fake))
    if fewest > options.neighbours:
        figures["precision"], figures["recall"] = precision_recall(
            real, fake, options.neighbours, lambda share: report("precision and recall", share)
        )
    if fewest > options.density_neighbours:
        figures["density"], figures["coverage"] = density_coverage(
            real, fake, options.density_neighbours, lambda share: report("density and coverage", share)
        )
    if fewest > 1:
        report("kernel distance", 0)
        figures["kernel"], figures["kernel_spread"] = kernel_distance(
            real, fake, min(options.kernel_subset, fewest), options.kernel_subsets, options.kernel_seed
        )
    return figures


def mean_and_spread(runs: list[Figures]) -> tuple[Figures, Figures]:
    """Mean and standard deviation (of a sample: n - 1) of figures over repetitions; no spread of one."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    means = {name: float(np.mean([run[name] for run in runs])) for name in names}
    spreads = {name: float(np.std([run[name] for run in runs], ddof=1)) for name in names} if len(runs) > 1 else {}
    return means, spreads
