"""Which images a picture shall show: seeds, labels, columns and names of rows from what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamamba.data.labels import find_label
from lamamba.runs.model import Model
from lamamba.sampling.settings import ImageMetadata, Interpolated

DEFAULT_COLUMNS, DEFAULT_CLASSES, PATH_ROWS = 8, 10, 4


@dataclass(frozen=True)
class Asked:
    """Images in the order of a table's cells."""

    seeds: tuple[int | Interpolated, ...]
    labels: tuple[int | Interpolated, ...] | None
    columns: int
    row_names: tuple[str, ...]


def find_labels(classes: Sequence[int | str] | None, label_names: Sequence[str], num_classes: int) -> list[int]:
    """Labels of class numbers or names; the first ten of None.

    Raises:
        ValueError: for a number out of range or an unknown name; the nearest is named.
    """
    if classes is None:
        return list(range(min(DEFAULT_CLASSES, num_classes)))
    return [find_label(each, label_names, num_classes) for each in classes]


def table(model: Model, classes: Sequence[int | str] | None, num: int, seed: int) -> Asked:
    """One row for each class (or rows of eight, of an unconditional model), one seed for each image.

    Raises:
        ValueError: for classes that do not fit.
    """
    if not model.num_classes:
        if classes is not None:
            raise ValueError(f"{model.name} is unconditional: it knows no classes, leave --classes out")
        return Asked(tuple(range(seed, seed + num)), None, min(num, DEFAULT_COLUMNS), ())
    rows = find_labels(classes, model.metadata.label_names, model.num_classes)
    labels = tuple(label for label in rows for _ in range(num))
    names = tuple(model.name_of(label) for label in rows)
    return Asked(tuple(range(seed, seed + len(labels))), labels, num, names)


def path_between(model: Model, text: str, classes: Sequence[int | str] | None, num: int, seed: int) -> Asked:
    """A walk in `num` columns: "seeds:3:7" for each class, "classes:3:8" from a few seeds.

    Raises:
        ValueError: for another text, or places that the model does not know.
    """
    what, *ends = (word.strip() for word in text.split(":"))
    if what not in ("seeds", "classes") or len(ends) != 2 or (what == "seeds" and not all(e.isdigit() for e in ends)):
        raise ValueError(f"--interpolate {text} is not understood; write seeds:3:7 or classes:3:8 (numbers or names)")
    if num < 2:
        raise ValueError(f"--num {num}: a path between two {what} has at least 2 images")
    weights = [column / (num - 1) for column in range(num)]
    if what == "seeds":
        first, second = map(int, ends)
        start = table(model, classes, 1, 0)                                     # its labels: a row for each class
        rows = start.labels or (None,)
        seeds = tuple(Interpolated(first, second, weight) for _ in rows for weight in weights)
        labels = None if start.labels is None else tuple(label for label in start.labels for _ in weights)
        return Asked(seeds, labels, num, start.row_names)
    if not model.num_classes:
        raise ValueError(f"{model.name} is unconditional: it knows no classes to go between; write seeds:3:7")
    if classes is not None:
        raise ValueError("--interpolate classes:A:B names its classes itself: leave --classes out")
    a, b = (find_label(end, model.metadata.label_names, model.num_classes) for end in ends)
    starts = range(seed, seed + PATH_ROWS)
    return Asked(
        tuple(start for start in starts for _ in weights),
        tuple(Interpolated(a, b, w) for _ in starts for w in weights), num, tuple(f"seed {start}" for start in starts),
    )


def as_before(facts: ImageMetadata) -> Asked:
    """What a picture shows."""
    return Asked(facts.seeds, facts.labels, facts.columns, facts.row_names)
