"""Are generated digits the ones that were asked for, do they differ, and are they more than copies?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HELD_OUT = 360
"""Real digits that the judge never sees before it is judged itself."""


def _rows(images: np.ndarray) -> np.ndarray:
    """uint8 images of any layout as rows of numbers in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / 255


class DigitJudge:
    """A support vector machine (RBF) trained on real digits, and how often it is right on held-out ones.

    Args:
        images, labels: the real digits, (n, ...) uint8 and (n,).

    Raises:
        RuntimeError: when scikit-learn is not installed.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int = 0):
        try:
            from sklearn.svm import SVC
        except ModuleNotFoundError as error:
            raise RuntimeError("judging digits needs scikit-learn: pip install 'lamamba-diff[digits]'") from error
        order = np.random.default_rng(seed).permutation(len(images))
        unseen, seen = order[:HELD_OUT], order[HELD_OUT:]
        self._machine = SVC(C=10, gamma="scale").fit(_rows(images[seen]), labels[seen])
        self.held_out_accuracy = float((self.classify(images[unseen]) == labels[unseen]).mean())

    def classify(self, images: np.ndarray) -> np.ndarray:
        """The digit that each image shows: (n,) int."""
        return self._machine.predict(_rows(images))


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
    """Distance of each image to the nearest of the others (n,); with same_set an image is not its own neighbour."""
    distances = _distances(_rows(images), _rows(others))
    if same_set:
        np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


@dataclass(frozen=True)
class DigitScore:
    """What the judge says of generated digits beside real ones."""

    held_out_accuracy: float
    """Of the judge, on real digits it had not seen."""
    recognised: int
    asked: int
    spread: float
    """Mean distance between two samples of a class."""
    real_spread: float
    nearest_to_real: float
    """Median distance of a sample to the nearest real digit."""
    real_to_real: float
    """Median distance of a real digit to the nearest other one."""

    @property
    def spread_share(self) -> float:
        """Spread as a share of the real digits': well below 1 means collapse."""
        return self.spread / self.real_spread


def score_digits(
    samples: np.ndarray, asked: np.ndarray, real: np.ndarray, real_labels: np.ndarray, seed: int = 0
) -> DigitScore:
    """Judge samples (n, ...) uint8 that were asked to show `asked` (n,), with the real digits beside them."""
    judge = DigitJudge(real, real_labels, seed)
    return DigitScore(
        held_out_accuracy=judge.held_out_accuracy,
        recognised=int((judge.classify(samples) == asked).sum()),
        asked=len(samples),
        spread=mean_distance_within_classes(samples, asked),
        real_spread=mean_distance_within_classes(real, real_labels),
        nearest_to_real=float(np.median(nearest_distances(samples, real))),
        real_to_real=float(np.median(nearest_distances(real, real, same_set=True))),
    )
