"""The evaluation protocol: samples and references, cached features, results with everything they depend on."""

from lamamba.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

__all__ = [
    "Statistics", "density_coverage", "frechet_distance", "inception_score", "kernel_distance", "precision_recall",
]
