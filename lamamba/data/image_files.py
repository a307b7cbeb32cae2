"""Files of image sets: which are images, what is left out, how names and classes are written. No torch here."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from lamamba.data.labels import composed

MANIFEST_NAME = "lamamba-manifest.json"
MAX_CLASS = 100_000
"""Largest class number in a set that has fewer images than that."""
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow recognises and does not decode by itself; for EPS it would start another program."""
JUNK = {
    "__macosx", "@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin", "recycler", "system volume information",
    "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
}
"""Files and folders that systems put beside images, in lower case; so are all names that begin with a dot."""
JUNK_REASON = "hidden or of the system"
NAMED = 3
"""Files of each kind that a message names."""


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Formats that this Pillow decodes, the usual ones first."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - NOT_DECODED, key=lambda name: (name not in ("JPEG", "PNG"), name)))


@functools.cache
def image_extensions() -> frozenset[str]:
    """Endings of their files, in lower case."""
    formats = {*image_formats(), "MPO"}                                         # which Pillow opens as JPEG
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def is_junk(name: str) -> bool:
    """Whether a path below a source's folder leads to what systems put beside images, hidden files among it."""
    return any(
        part.casefold() in JUNK or (part.startswith(".") and part not in (".", "..")) for part in name.split("/")
    )


def printable(name: str) -> str:
    """A file's name without control characters and bytes that are not UTF-8: these as \\x09."""
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)


class LeftOut:
    """Files that a source does not use: how many for each reason, and the first names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        if count:
            self.counts[reason] += count
            names = self._names.setdefault(reason, [])
            if len(names) < NAMED:
                names.append(printable(name))

    def add_ending(self, name: str) -> None:
        """A file that is no image by its name."""
        if not name.endswith(MANIFEST_NAME):
            self.add(os.path.splitext(name)[1].lower() or "without ending", name)

    def update(self, other: LeftOut) -> None:
        for reason, count in other.counts.items():
            self.counts[reason] += count
            self._names[reason] = (self._names.get(reason, []) + other._names[reason])[:NAMED]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        shown = {reason: ", ".join(names) for reason, names in self._names.items()}
        more = {reason: ", ..." if count > len(self._names[reason]) else "" for reason, count in self.counts.items()}
        return "; ".join(f"{self.counts[reason]:,} {reason} ({shown[reason]}{more[reason]})" for reason in self.counts)


def sizes_and_times(files: Iterable[str]) -> list[int]:
    return [value for stat in map(os.stat, files) for value in (stat.st_size, stat.st_mtime_ns)]


def number_classes(source: str, classes: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and labels of classes: numbers are labels, words are numbered in alphabetical order.

    Raises:
        ValueError: for numbers below 0, or so large that they cannot be labels.
    """
    words = set(classes)
    if words and all(re.fullmatch(r"-?\d{1,100}", word) for word in words):
        numbers = [int(word) for word in classes]
        lowest, highest = min(numbers), max(numbers)
        if lowest < 0 or highest >= max(MAX_CLASS, len(classes)):
            raise ValueError(
                f"{source} has the class {lowest if lowest < 0 else highest} in {len(classes):,} images; numbers are "
                "labels, and count the classes from 0: number them so, or write words"
            )
        return tuple(map(str, range(highest + 1))), np.array(numbers, dtype=np.int64)
    spelled: dict[str, str] = {}
    for word in sorted(words):
        spelled.setdefault(composed(word), word)
    numbered = {name: number for number, name in enumerate(spelled)}
    labels = [numbered[composed(word)] for word in classes]
    return tuple(spelled.values()), np.array(labels, dtype=np.int64)
