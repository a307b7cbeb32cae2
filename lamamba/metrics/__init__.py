"""Figures of NumPy arrays (Fréchet distance, precision and recall, ...), and feature networks."""

from lamamba.metrics.frechet import frechet_distance
from lamamba.metrics.neighbours import density_coverage, precision_recall
from lamamba.metrics.scores import inception_score, kernel_distance
from lamamba.metrics.statistics import Statistics

__all__ = [
    "Statistics", "density_coverage", "frechet_distance", "inception_score", "kernel_distance", "precision_recall",
]
