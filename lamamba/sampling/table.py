"""The seeds and labels of a picture's images: a row for each class, or an interpolation in each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamamba.data.labels import find_label
from lamamba.options.sampling import SampleOptions
from lamamba.runs.model import Model
from lamamba.sampling.settings import ImageMetadata, Interpolated
from lamamba.viz.grids import check_grid

DEFAULT_COLUMNS, DEFAULT_CLASSES, INTERPOLATION_ROWS = 8, 10, 4


@dataclass(frozen=True)
class Table:
    """Seeds and labels of images, row by row."""

    seeds: tuple[int | Interpolated, ...]
    labels: tuple[int | Interpolated, ...] | None
    """None for an unconditional model."""
    columns: int
    """0 where the picture is a single image as the model made it."""
    row_names: tuple[str, ...]


def describe_seeds(seeds: Sequence[int | Interpolated]) -> str:
    """The range of seeds in words."""
    numbers = [seed for seed in seeds if isinstance(seed, int)]
    if len(numbers) == len(seeds):
        return f"seeds {min(numbers)} to {max(numbers)}"
    return "on the way from one seed to another"


def find_labels(classes: Sequence[int | str] | None, label_names: Sequence[str], num_classes: int) -> list[int]:
    """Labels of class numbers or names; the first ten of None.

    Raises:
        ValueError: for a number out of range or an unknown name; the nearest is named.
    """
    if classes is not None and not len(classes):
        raise ValueError("classes names none: give at least one, or leave it out")
    if classes is None:
        return list(range(min(DEFAULT_CLASSES, num_classes)))
    return [find_label(each, label_names, num_classes) for each in classes]


def make_table(options: SampleOptions, picture: ImageMetadata | None, model: Model) -> Table:
    """The table that options describe; what they leave out is as in the picture to be repeated.

    Raises:
        ValueError: for classes that do not fit the model, or when the picture shows an interpolation and only a part
            of it is changed.
    """
    classes, num, seed = options.classes, options.num, options.seed
    if picture is not None:
        if classes is num is seed is options.interpolate is None:
            return Table(picture.seeds, picture.labels, picture.columns, _row_names(picture, model))
        if any(isinstance(value, Interpolated) for value in (*picture.seeds, *(picture.labels or ()))):
            raise ValueError("that picture shows an interpolation: give interpolate again, with what is to change")
        rows = tuple(int(label) for label in (picture.labels or ())[:: picture.columns or 1] if isinstance(label, int))
        classes = classes or (None if options.interpolate else rows or None)
        num = num or (picture.columns or 1 if picture.labels else len(picture.seeds))
        first = picture.seeds[0]
        seed = first if seed is None and isinstance(first, int) else seed
    num, seed = num or DEFAULT_COLUMNS, seed or 0
    if options.out is not None:
        count = num * len(classes or range(min(DEFAULT_CLASSES, model.num_classes)) or (None,))
        advice = " (num is of each class): take fewer, or fill a folder, as in lamamba sample -n 50000 --balanced "
        check_grid(count, *model.fit(options.height, options.width)[1], f"{advice}--out FOLDER")
    if options.interpolate:
        return interpolation_table(model, options.interpolate, classes, num, seed)
    return class_table(model, classes, num, seed)


def _row_names(picture: ImageMetadata, model: Model) -> tuple[str, ...]:
    """Names of a picture's rows: of the classes of this model, which need not be the picture's; else as they are."""
    labels = (picture.labels or ())[:: picture.columns or 1]
    if not picture.row_names or not all(isinstance(label, int) and label < model.num_classes for label in labels):
        return picture.row_names
    return tuple(model.name_of(label) for label in labels if isinstance(label, int))


def class_table(model: Model, classes: Sequence[int | str] | None, num: int, seed: int) -> Table:
    """One row for each class (or rows of eight, of an unconditional model), one seed for each image.

    Raises:
        ValueError: for classes that do not fit.
    """
    if not model.num_classes:
        if classes is not None:
            raise ValueError(f"{model.name} is unconditional: it knows no classes, leave classes out")
        return Table(tuple(range(seed, seed + num)), None, min(num, DEFAULT_COLUMNS), ())
    rows = find_labels(classes, model.metadata.label_names, model.num_classes)
    labels = tuple(label for label in rows for _ in range(num))
    names = tuple(model.name_of(label) for label in rows)
    return Table(tuple(range(seed, seed + len(labels))), labels, num, names)


def interpolation_table(model: Model, text: str, classes: Sequence[int | str] | None, num: int, seed: int) -> Table:
    """An interpolation in `num` columns: "seeds:3:7" for each class, "classes:3:8" for each of a few seeds.

    Raises:
        ValueError: for another text, or seeds or classes that do not fit the model.
    """
    what, *ends = (word.strip() for word in text.split(":"))
    if what not in ("seeds", "classes") or len(ends) != 2 or (what == "seeds" and not all(e.isdecimal() for e in ends)):
        raise ValueError(f"interpolate={text} is not understood; write seeds:3:7 or classes:3:8 (numbers or names)")
    if num < 2:
        raise ValueError(f"num={num}: an interpolation between two {what} has at least 2 images")
    weights = [column / (num - 1) for column in range(num)]
    if what == "seeds":
        first, second = map(int, ends)
        start = class_table(model, classes, 1, 0)                               # its labels: a row for each class
        rows = start.labels or (None,)
        seeds = tuple(Interpolated(first, second, weight) for _ in rows for weight in weights)
        labels = None if start.labels is None else tuple(label for label in start.labels for _ in weights)
        return Table(seeds, labels, num, start.row_names)
    if not model.num_classes:
        raise ValueError(f"{model.name} is unconditional: it knows no classes to go between; write seeds:3:7")
    if classes is not None:
        raise ValueError("interpolate=classes:A:B names its classes itself: leave classes out")
    a, b = (find_label(end, model.metadata.label_names, model.num_classes) for end in ends)
    starts = range(seed, seed + INTERPOLATION_ROWS)
    return Table(
        tuple(start for start in starts for _ in weights),
        tuple(Interpolated(a, b, w) for _ in starts for w in weights), num, tuple(f"seed {start}" for start in starts),
    )
