"""Which class an image shows depends on its seed (drawn) or its place (in turn), and on nothing else."""

from __future__ import annotations

import hashlib

from lamamba.sampling.labels import label_of


def test_a_drawn_class_is_its_seeds():
    classes = [3, 5, 8]
    for seed in (0, 7, 2**63 - 1):
        number = int(hashlib.sha256(b"label %d" % seed).hexdigest()[:16], 16)
        assert {label_of("random", k, seed, classes) for k in (0, 1, 99)} == {classes[number % 3]}
    drawn = [label_of("random", 0, seed, range(10)) for seed in range(5000)]
    assert all(420 < drawn.count(label) < 580 for label in range(10))           # 500 each, four standard deviations


def test_classes_in_turn_are_the_places():
    assert [label_of("balanced", k, 1000 - k, [3, 5, 8]) for k in range(7)] == [3, 5, 8, 3, 5, 8, 3]
