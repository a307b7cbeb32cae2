"""Streaming mean and covariance of features, in float64; processes reduce theirs to those of all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def check_features(features: np.ndarray, what: str = "features") -> np.ndarray:
    """Features as a matrix (images, features) of finite numbers, unchanged.

    Raises:
        ValueError: when they are no such matrix, or one of them is NaN or infinite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape or not np.issubdtype(features.dtype, np.number):
        raise ValueError(
            f"{what} have shape {features.shape} and type {features.dtype}; (images, features) of numbers fit"
        )
    for start in range(0, len(features), 4096):
        if not np.isfinite(features[start : start + 4096]).all():
            rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
            raise ValueError(
                f"{what} of {len(rows)} of {len(features)} images are NaN or infinite, first of image {rows[0]}; "
                "look at that image, and at the precision of the feature network"
            )
    return features


def check_pair(reference: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of two sets by one network; raises as `check_features`, and for different sizes."""
    reference, samples = check_features(reference, "reference features"), check_features(samples)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"{reference.shape[1]} reference features against {samples.shape[1]}: they come from different networks"
        )
    return reference, samples


class Statistics:
    """Number, mean and scatter matrix of feature vectors, updated by `add`.

    The scatter matrix is sum (x - mean)(x - mean)^T about the current mean (Chan, Golub, LeVeque, 1979): features far
    from zero lose no digits, and memory does not grow with their number.
    """

    def __init__(self, size: int):
        self.count = 0
        self.mean = np.zeros(size)
        self.scatter = np.zeros((size, size))

    def add(self, features: np.ndarray) -> Statistics:
        """Update by features (images, size). Returns itself.

        Raises:
            ValueError: for another size, or numbers that are not finite.
        """
        features = check_features(features)
        if features.shape[1] != len(self.mean):
            raise ValueError(f"{features.shape[1]} features came after {len(self.mean)}; one network gives one size")
        for start in range(0, len(features), 4096):                             # float64 copies of a piece at a time
            rows = features[start : start + 4096].astype(np.float64)
            mean = rows.mean(axis=0)
            rows -= mean
            total, difference = self.count + len(rows), mean - self.mean
            self.scatter += rows.T @ rows
            if self.count:
                self.scatter += np.outer(difference, difference * (self.count * len(rows) / total))
            self.mean, self.count = self.mean + difference * (len(rows) / total), total
        return self

    def covariance(self) -> np.ndarray:
        """As np.cov: divided by one less than the number of images.

        Raises:
            ValueError: for fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} image{'' if self.count == 1 else 's'}: a covariance needs at least 2")
        return self.scatter / (self.count - 1)

    def reduce(self, all_reduce: Callable[[np.ndarray], np.ndarray]) -> Statistics:
        """Statistics of all processes' features; the same on every rank.

        Args:
            all_reduce: the elementwise sum of an array over processes. It is called with the counts and means, then
                with the scatter matrices.
        """
        sums = all_reduce(np.concatenate([[float(self.count)], self.count * self.mean]))
        together = Statistics(len(self.mean))
        together.count = int(sums[0])
        together.mean = sums[1:] / max(together.count, 1)
        difference = self.mean - together.mean
        together.scatter = all_reduce(self.scatter + self.count * np.outer(difference, difference))
        return together
