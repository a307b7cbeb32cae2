"""How good samples are. Takes images and features as arrays; never samples by itself."""

from lamamba.evaluation.frechet import frechet_distance
from lamamba.evaluation.neighbours import density_coverage, precision_recall
from lamamba.evaluation.scores import inception_score, kernel_distance
from lamamba.evaluation.statistics import Statistics

__all__ = [
    "Statistics", "density_coverage", "frechet_distance", "inception_score", "kernel_distance", "precision_recall",
]
