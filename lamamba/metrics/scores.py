"""Kernel distance (KID) and Inception Score."""

from __future__ import annotations

import numpy as np

from lamamba.metrics.statistics import check_features, check_pair


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3: unbiased, also for few images (KID).

    Args:
        reference, samples: features, (n, d) and (m, d).
        subset_size: images of each set in a subset, drawn without replacement.
        num_subsets: subsets that the mean is taken over.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets (Bińkowski et al., 2018, Eq. 4). The mean may be slightly negative.

    Raises:
        ValueError: when a subset is larger than a set or smaller than 2, or features do not fit each other.
    """
    reference, samples = check_pair(reference, samples)
    if not 2 <= subset_size <= min(len(reference), len(samples)) or num_subsets < 1:
        raise ValueError(
            f"{num_subsets} subsets of {subset_size} images do not fit {len(reference)} reference images and "
            f"{len(samples)} samples; a subset has 2 .. {min(len(reference), len(samples))}, and there is at least one"
        )
    draws, m, distances = np.random.default_rng(seed), subset_size, []
    for _ in range(num_subsets):
        x = reference[np.sort(draws.choice(len(reference), m, replace=False))].astype(np.float64)
        y = samples[np.sort(draws.choice(len(samples), m, replace=False))].astype(np.float64)
        within = 0.0
        for features in (x, y):
            kernel = _kernel(features, features)
            within += (kernel.sum() - np.trace(kernel)) / (m * (m - 1))
        distances.append(within - 2 * _kernel(x, y).mean())
    return float(np.mean(distances)), float(np.std(distances))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (n, classes) of logits, float64."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    np.exp(values, out=values)                                                  # in place: 50,000 x 1008 are 0.4 GB
    values /= values.sum(axis=1, keepdims=True)
    return values


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y | image) from p(y), over sequential splits.

    Args:
        probabilities: of classes, (n, classes), in the images' order.
        split_size: images in a split; the last may be smaller (the evaluator of ADM does the same).

    Returns:
        Mean and standard deviation over the splits (Salimans et al., 2016).

    Raises:
        ValueError: when rows are not probabilities.
    """
    probabilities = check_features(probabilities, "probabilities")
    if split_size < 1:
        raise ValueError(f"split_size={split_size} must be at least 1")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if probabilities.min() < 0 or np.abs(sums - 1).max() > 1e-3:
        raise ValueError(
            f"rows sum to {sums.min():.4g} .. {sums.max():.4g} from entries of {probabilities.min():.4g} on; "
            "probabilities are not negative and sum to 1 (take the softmax of logits)"
        )
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size].astype(np.float64)
        mean = part.mean(axis=0)
        logarithms = np.log(part, out=np.zeros_like(part), where=part > 0)      # 0 log 0 = 0
        scores.append(np.exp((part * logarithms).sum(axis=1).mean() - (mean[mean > 0] * np.log(mean[mean > 0])).sum()))
    return float(np.mean(scores)), float(np.std(scores))
