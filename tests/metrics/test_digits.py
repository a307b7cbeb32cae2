"""The classifier of digits is accurate on real ones; the scores show collapse and copies."""

from __future__ import annotations

import numpy as np
import pytest

from lamamba.data.digits import Digits
from lamamba.metrics.digits import mean_distance_within_classes, nearest_distances, score_digits


@pytest.fixture(scope="module")
def digits():
    return Digits()


def test_the_classifier_is_accurate_on_held_out_digits(digits):
    score = score_digits(digits.images[:300], digits.labels[:300], digits.images, digits.labels)
    assert score.held_out_accuracy >= 0.97
    assert score.recognised >= 295
    assert score.nearest_to_real == 0                                          # copies
    assert score.real_to_real > 0.5


def test_wrong_classes_and_collapse_show(digits):
    rows = np.concatenate([np.flatnonzero(digits.labels == d)[:1].repeat(5) for d in range(10)])
    collapsed = score_digits(digits.images[rows], digits.labels[rows], digits.images, digits.labels)
    assert collapsed.recognised == collapsed.num_samples == 50
    assert collapsed.spread_share == pytest.approx(0, abs=1e-6)
    wrong = score_digits(digits.images[rows], (digits.labels[rows] + 1) % 10, digits.images, digits.labels)
    assert wrong.recognised == 0


def test_distances_by_hand():
    images = np.array([[0, 0], [255, 0], [0, 255], [255, 255]], dtype=np.uint8)
    assert mean_distance_within_classes(images, np.array([0, 0, 1, 1])) == pytest.approx(1)
    assert nearest_distances(images, images).tolist() == [0, 0, 0, 0]
    assert nearest_distances(images, images, same_set=True).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="class 1 has 1 image"):
        mean_distance_within_classes(images[:3], np.array([0, 0, 1]))
