"""Labels of the images of a set: a function of the index k and the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

LabelRule = Literal["balanced", "random", "none"]
"""Of a set of images; none for unconditional models."""


def label_of(rule: Literal["balanced", "random"], k: int, seed: int, classes: Sequence[int]) -> int:
    """The label of image k.

    Args:
        rule: "balanced": the classes in turn, so that any first part of the images is balanced, too; "random": drawn
            uniformly, by the first 8 bytes of SHA-256("label SEED") as a big-endian number, modulo their number.
        k: the image's index.
        seed: the image's own.
        classes: to choose from.
    """
    if rule == "balanced":
        return classes[k % len(classes)]
    number = int.from_bytes(hashlib.sha256(f"label {seed}".encode()).digest()[:8], "big")
    return classes[number % len(classes)]
