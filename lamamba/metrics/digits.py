"""Accuracy, spread within classes, and distance from the real images, of generated digits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HELD_OUT = 360
"""Real digits that classifiers are tested on and never trained on."""


def _rows(images: np.ndarray) -> np.ndarray:
    """uint8 images of any layout as (n, pixels) float64 in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / 255


class DigitClassifier:
    """Support vector machine with an RBF kernel on pixels, and its accuracy on held-out digits.

    Args:
        images, labels: real digits, (n, ...) uint8 and (n,).

    Raises:
        RuntimeError: when scikit-learn is not installed.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        try:
            from sklearn.svm import SVC
        except ModuleNotFoundError as error:
            raise RuntimeError("classifying digits needs scikit-learn: pip install 'lamamba-diff[digits]'") from error
        order = np.random.default_rng(0).permutation(len(images))
        held_out, training = order[:HELD_OUT], order[HELD_OUT:]
        self._svm = SVC(C=10, gamma="scale", random_state=0).fit(_rows(images[training]), labels[training])
        self.held_out_accuracy = float((self.classify(images[held_out]) == labels[held_out]).mean())

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Predicted classes, (n,) int."""
        return self._svm.predict(_rows(images))


def mean_distance_within_classes(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance between two different images of a class, averaged over classes; pixels in [0, 1].

    Raises:
        ValueError: when a class has fewer than two images.
    """
    means = []
    for label in np.unique(labels):
        rows = _rows(images[labels == label])
        if len(rows) < 2:
            raise ValueError(f"class {label} has {len(rows)} image; distances within a class need at least two")
        means.append(_distances(rows, rows).sum() / (len(rows) * (len(rows) - 1)))
    return float(np.mean(means))


def nearest_distances(images: np.ndarray, others: np.ndarray, *, same_set: bool = False) -> np.ndarray:
    """Euclidean distance of each image to the nearest of the others, (n,); pixels in [0, 1].

    Args:
        images, others: uint8.
        same_set: both are the same images, and an image is not its own neighbour.
    """
    distances = _distances(_rows(images), _rows(others))
    if same_set:
        np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


@dataclass(frozen=True)
class DigitScore:
    """Generated digits compared with real ones."""

    held_out_accuracy: float
    """Of the classifier, on real digits that it was not trained on."""
    recognised: int
    """Samples classified as the class they were conditioned on."""
    num_samples: int
    spread: float
    """Mean distance between two samples of a class."""
    real_spread: float
    nearest_to_real: float
    """Median distance of a sample to the nearest real digit."""
    real_to_real: float
    """Median distance of a real digit to the nearest other one."""

    @property
    def spread_share(self) -> float:
        """Spread as a share of the real digits'; well below 1 means mode collapse."""
        return self.spread / self.real_spread


def score_digits(samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> DigitScore:
    """Compare samples with real digits.

    Args:
        samples, labels: (n, ...) uint8, and the classes that they were conditioned on, (n,).
        real, real_labels: the real digits.
    """
    classifier = DigitClassifier(real, real_labels)
    return DigitScore(
        held_out_accuracy=classifier.held_out_accuracy,
        recognised=int((classifier.classify(samples) == labels).sum()), num_samples=len(samples),
        spread=mean_distance_within_classes(samples, labels),
        real_spread=mean_distance_within_classes(real, real_labels),
        nearest_to_real=float(np.median(nearest_distances(samples, real))),
        real_to_real=float(np.median(nearest_distances(real, real, same_set=True))),
    )
