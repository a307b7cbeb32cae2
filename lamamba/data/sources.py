"""Sources of image files: folders, WebDataset tars, Hugging Face data sets. Bytes, names and labels, nothing decoded.

No torch here: processes that check images start quickly.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DATASETS_PREFIX = "datasets:"


class Source(Protocol):
    """Image files by index, with their classes."""

    name: str
    """As the user gave it."""
    label_names: tuple[str, ...]
    """One name per class, in the order of the labels; empty where there are no classes."""
    labels: np.ndarray
    """(n,) int64; 0 where there are no classes."""

    def __len__(self) -> int: ...

    def file(self, index: int) -> str:
        """Name of a file, unique within the source."""
        ...

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        ...


def open_source(name: str | Path) -> Source:
    """Open a folder of images, a folder of tars, a tar, a pattern of tars, a `datasets` folder, or datasets:ID@SPLIT.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when it holds no images, or its classes are ambiguous.
        RuntimeError: when the package that reads it is missing.
    """
    text, path = str(name), Path(name)
    if text.startswith(DATASETS_PREFIX):
        return DatasetSource(text)
    if path.suffix == ".tar" or "{" in text:
        return TarSource(text)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{text} is not a folder; give a folder with images or with one subfolder per class, WebDataset tars "
            "(shards-{000..099}.tar, or their folder), or datasets:ID for a Hugging Face data set"
        )
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return DatasetSource(DATASETS_PREFIX + text)
    if any(entry.name.endswith(".tar") for entry in os.scandir(path)):
        return TarSource(text)
    return FolderSource(text)


class FolderSource:
    """Images below a folder; the names of its subfolders, sorted, are the classes. A flat folder has none.

    Raises:
        FileNotFoundError: when the folder is missing.
        ValueError: when it holds no images, or images both beside and inside subfolders.
    """

    def __init__(self, folder: str | Path):
        self.name, self._folder = str(folder), Path(folder)
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give one with images, or with one subfolder per class")
        flat, below = _images_in(self._folder)
        found = {sub: sorted(_images_below(self._folder, sub)) for sub in below}
        classes = {sub: files for sub, files in found.items() if files}
        self.empty_folders = tuple(sub for sub, files in found.items() if not files and sub[0] != ".")
        """Subfolders that hold no images, and so are no classes."""
        if flat and classes:
            raise ValueError(
                f"{folder} holds {len(flat)} images beside {len(classes)} subfolders with images; put every image into "
                "the subfolder of its class, or all of them into one flat folder"
            )
        if not flat and not classes:
            raise ValueError(f"{folder} holds no images ({', '.join(EXTENSIONS)}), neither flat nor in subfolders")
        self.label_names = tuple(classes)
        self._files = flat + [file for files in classes.values() for file in files]
        sizes = [len(files) for files in classes.values()] or [len(flat)]
        self.labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> str:
        return self._files[index]

    def read(self, index: int) -> bytes:
        return (self._folder / self._files[index]).read_bytes()


def _images_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the images and of the subfolders directly in a folder, sorted, without a stat of each file."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                files.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
    return sorted(files), sorted(folders)


def _images_below(top: Path, folder: str) -> Iterable[str]:
    files, folders = _images_in(top / folder)
    yield from (f"{folder}/{file}" for file in files)
    for sub in folders:
        yield from _images_below(top, f"{folder}/{sub}")


class TarSource:
    """Uncompressed WebDataset tars: files of one sample share a name up to its first dot (a.jpg, a.cls).

    `.cls` holds the class, a number or a word. Tars are read in place: offset and size of each image are listed at the
    start, so that images can be read in any order.

    Raises:
        FileNotFoundError: when there is no tar of that name.
        ValueError: naming the tar that is damaged or compressed, or samples without a class beside ones with.
        RuntimeError: when the package webdataset is not installed.
    """

    def __init__(self, name: str):
        try:
            from webdataset.shardlists import expand_urls
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"{name} holds tars, which need the package webdataset: pip install 'lamamba-diff[webdataset]'"
            ) from error
        self.name = name
        if os.path.isdir(name):
            tars = sorted(entry.path for entry in os.scandir(name) if entry.name.endswith(".tar"))
        else:
            tars = list(expand_urls(name))
        self._tars = tars
        for tar in tars:
            if not os.path.isfile(tar):
                raise FileNotFoundError(f"{tar} does not exist; {name} names {len(tars)} tars")
        with ThreadPoolExecutor(max_workers=8) as pool:
            tables = list(pool.map(_read_table, tars))
        rows = [(number, *row) for number, table in enumerate(tables) for row in table]
        if not rows:
            raise ValueError(f"{name} holds no images ({', '.join(EXTENSIONS)})")
        self._files = [row[1] for row in rows]
        self._locations = np.array([(row[0], row[2], row[3]) for row in rows], dtype=np.int64)     # tar, offset, size
        classes = [row[4] for row in rows]
        unlabelled = classes.count(None)
        if 0 < unlabelled < len(classes):
            first = self.file(classes.index(None))
            raise ValueError(
                f"{unlabelled} of {len(classes)} images of {name} have no class (the first is {first}); give each a "
                ".cls file beside it, or none"
            )
        self.label_names, self.labels = _number_classes(classes)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> str:
        return f"{os.path.basename(self._tars[self._locations[index, 0]])}/{self._files[index]}"

    def read(self, index: int) -> bytes:
        tar, offset, size = self._locations[index]
        with open(self._tars[tar], "rb") as file:
            file.seek(offset)
            return file.read(size)


def _number_classes(classes: Sequence[str | None]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and labels of classes: numbers are labels, words are numbered in alphabetical order."""
    words = {word for word in classes if word is not None}
    if not words:
        return (), np.zeros(len(classes), dtype=np.int64)
    if all(word.isdecimal() for word in words):
        labels = np.array([int(word) for word in classes if word is not None], dtype=np.int64)
        return tuple(str(k) for k in range(int(labels.max()) + 1)), labels
    names = tuple(sorted(words))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[str(word)] for word in classes], dtype=np.int64)


def _read_table(tar: str) -> list[tuple[str, int, int, str | None]]:
    """(name, offset, size, class) of each image of a tar."""
    from webdataset.tariterators import base_plus_ext

    images, classes = [], {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                if f".{extension.lower()}" in EXTENSIONS:
                    images.append((member.name, member.offset_data, member.size, key))
                elif extension == "cls":
                    held = archive.extractfile(member)
                    classes[key] = held.read().decode().strip() if held else ""
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{tar} is damaged, compressed or no tar ({error}); write it again, without compression"
        ) from error
    return [(name, offset, size, classes.get(key)) for name, offset, size, key in images]


class DatasetSource:
    """A data set of the package `datasets`: an id of the Hugging Face hub, or a folder; @SPLIT chooses the split.

    Raises:
        ValueError: when it has no column of images, or the split does not exist.
        RuntimeError: when the package is not installed or the data set cannot be loaded.
    """

    def __init__(self, name: str):
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise RuntimeError(f"{name} needs the package datasets: pip install 'lamamba-diff[datasets]'") from error
        self.name = name
        place, _, split = name.removeprefix(DATASETS_PREFIX).partition("@")
        split = split or "train"
        saved = any((Path(place) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
        try:
            loaded: Any = datasets.load_from_disk(place) if saved else datasets.load_dataset(place)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise RuntimeError(f"{name} cannot be had: {error}") from error
        if isinstance(loaded, dict):
            if split not in loaded:
                raise ValueError(f"{name} has no split {split!r}; it has {', '.join(loaded)}: write datasets:ID@SPLIT")
            loaded = loaded[split]
        images = [key for key, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise ValueError(f"{name} has no column of images; its columns are {', '.join(loaded.features)}")
        self._column = images[0]
        classes = [key for key, feature in loaded.features.items() if isinstance(feature, datasets.ClassLabel)]
        self.label_names: tuple[str, ...] = ()
        self.labels = np.zeros(len(loaded), dtype=np.int64)
        if classes:
            column = "label" if "label" in classes else classes[0]
            self.label_names = tuple(loaded.features[column].names)
            self.labels = np.asarray(loaded[column], dtype=np.int64)
            if len(self.labels) and self.labels.min() < 0:
                raise ValueError(
                    f"{name} has images without a class in column {column!r} (label -1); choose another split"
                )
        self._rows = loaded.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self._split = split

    def __len__(self) -> int:
        return len(self._rows)

    def file(self, index: int) -> str:
        return f"{self._split}/{index}"

    def read(self, index: int) -> bytes:
        held = self._rows[int(index)][self._column]
        return held["bytes"] if held["bytes"] is not None else Path(held["path"]).read_bytes()


def fingerprint(source: Source, excluded: Iterable[str] = ()) -> str:
    """SHA-256 of the names, classes and order of a source's files, and of which are excluded.

    The files' contents are not read: a file replaced under the same name does not change it.
    """
    digest = hashlib.sha256()
    for name in source.label_names:
        digest.update(name.encode() + b"\0")
    for index, label in enumerate(source.labels.tolist()):
        digest.update(f"{label}\t{source.file(index)}\n".encode())
    for file in sorted(excluded):
        digest.update(file.encode() + b"\0")
    return digest.hexdigest()
