"""Data sets of the package `datasets`, saved or of the Hugging Face hub, as a source of image files. No torch here."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamamba.data.image_files import LeftOut, number_classes, sizes_and_times

logger = logging.getLogger("lamamba.data")

DATASETS_PREFIX = "datasets:"
LABEL_COLUMNS = ("label", "labels", "class", "target")
"""Columns of data sets that hold classes, if they are words or whole numbers."""


def is_saved_dataset(place: str) -> bool:
    """Whether a folder was written by save_to_disk of the package `datasets`."""
    return bool(place) and any((Path(place) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))


def dataset_place(name: str) -> tuple[str, str]:
    """Folder or hub id, and split, of datasets:PLACE@SPLIT. A saved folder may have @ in its name."""
    place = name.removeprefix(DATASETS_PREFIX)
    if is_saved_dataset(place) or "@" not in place:
        return place, "train"
    place, _, split = place.rpartition("@")
    return place, split or "train"


_FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What the package datasets raises for a folder whose files are damaged or missing."""


class DatasetSource:
    """A data set of the package `datasets`: an id of the Hugging Face hub, or a folder; @SPLIT chooses the split.

    The first column of images counts. Classes are the column "label" of ClassLabel, else the first such column, else
    the first of LABEL_COLUMNS that holds words or whole numbers. Rows without a class are left out.

    Raises:
        ValueError: when it has no column of images, or the split does not exist.
        RuntimeError: when the package is not installed or the data set cannot be loaded.
    """

    def __init__(self, name: str):
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise RuntimeError(f"{name} needs the package datasets: pip install 'lamamba-diff[datasets]'") from error
        self.name, self.left_out = name, LeftOut()
        place, split = dataset_place(name)
        if not place:
            raise ValueError(f"{name!r} names no data set: write datasets:ID or datasets:ID@SPLIT")
        try:
            loaded: Any = (datasets.load_from_disk if is_saved_dataset(place) else datasets.load_dataset)(place)
        except (*_FAULTS, datasets.exceptions.DatasetsError) as error:
            raise RuntimeError(f"{name} cannot be had: {type(error).__name__}: {error}") from error
        if isinstance(loaded, dict):
            if split not in loaded:
                raise ValueError(f"{name} has no split {split!r}; it has {', '.join(loaded)}: write datasets:ID@SPLIT")
            loaded = loaded[split]
        images = [key for key, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise ValueError(f"{name} has no column of images; its columns are {', '.join(loaded.features)}")
        self._column, self._split = images[0], split
        self.changed = sizes_and_times(file["filename"] for file in loaded.cache_files)
        self._kept = np.arange(len(loaded))
        self.label_names, self.labels = self._read_classes(loaded, _class_column(loaded.features))
        self._rows = loaded.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))

    def _read_classes(self, loaded: Any, column: str | None) -> tuple[tuple[str, ...], np.ndarray]:
        """Names and labels by a column; rows without a class are left out."""
        unused = [key for key in loaded.features if key not in (self._column, column)]
        if unused:
            logger.info("%s: classes from column %s, columns not used: %s", self.name, column, ", ".join(unused))
        if column is None:
            return (), np.zeros(len(loaded), dtype=np.int64)
        names = getattr(loaded.features[column], "names", None)
        classes = loaded[column][:]
        missing = [value is None or value == "" or (names is not None and value < 0) for value in classes]
        self._kept = np.flatnonzero(~np.array(missing, dtype=bool))
        if not len(self._kept):
            raise ValueError(f"{self.name} has no image with a class in column {column!r}; choose another split")
        for row in np.flatnonzero(missing):
            self.left_out.add(f"without a class in column {column}", f"{self._split}/{row}")
        held = [classes[row] for row in self._kept]
        if names is not None:
            return tuple(names), np.array(held, dtype=np.int64)
        return number_classes(self.name, [str(int(value)) if isinstance(value, int) else value for value in held])

    def __len__(self) -> int:
        return len(self._kept)

    def file(self, index: int) -> str:
        return f"{self._split}/{self._kept[index]}"

    def read(self, index: int) -> bytes:
        held = self._rows[int(self._kept[index])][self._column] or {}
        if held.get("bytes") is None and held.get("path") is None:
            return b""
        return held["bytes"] if held["bytes"] is not None else Path(held["path"]).read_bytes()


def _class_column(features: Mapping[str, Any]) -> str | None:
    """The column of a data set that holds classes."""
    labels = [key for key, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    plain = [
        key for key in LABEL_COLUMNS
        if re.match("string|large_string|u?int|bool", getattr(features.get(key), "dtype", None) or "")
    ]
    return "label" if "label" in labels else next(iter(labels + plain), None)
