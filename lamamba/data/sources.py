"""Sources of image files: folders here, tars and data sets in their modules. Bytes, names and labels, nothing decoded.

No torch here: processes that check images start quickly.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from lamamba.data.hub_sets import DATASETS_PREFIX, DatasetSource, is_saved_dataset
from lamamba.data.image_files import (
    JUNK_REASON,
    LeftOut,
    image_extensions,
    is_junk,
    printable,
)
from lamamba.data.labels import composed
from lamamba.data.tars import TarSource, is_tar
from lamamba.utils.text import counted

logger = logging.getLogger("lamamba.data")


class Source(Protocol):
    """Image files by index, with their classes."""

    name: str
    """As the user gave it."""
    label_names: tuple[str, ...]
    """One name per class, in the order of the labels; empty where there are no classes."""
    labels: np.ndarray
    """(n,) int64; 0 where there are no classes."""
    left_out: LeftOut
    """Files that are no images, or not used."""
    changed: list[int]
    """Sizes and times (ns) of the files that hold the images, where these are not files of their own."""

    def __len__(self) -> int: ...

    def file(self, index: int) -> str:
        """Name of a file, unique within the source and printable."""
        ...

    def read(self, index: int) -> bytes:
        """The file's bytes; none where a data set holds no image.

        Raises:
            OSError: when it is gone or cannot be read.
        """
        ...


def open_source(name: str | Path, files: Collection[str] = ()) -> Source:
    """Open a folder of images, a folder of tars, a tar, a pattern of tars, a `datasets` folder, or datasets:ID@SPLIT.

    What it leaves out is logged, on rank 0.

    Args:
        name: of the source.
        files: that a folder held before; those that are gone keep their places, and cannot be read.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when it holds no images, or its classes are ambiguous.
        RuntimeError: when the package that reads it is missing.
    """
    source = _open(str(name), Path(name), files)
    if os.environ.get("RANK", "0") == "0":
        for note in _notes(source):
            logger.warning("%s: %s", source.name, note)
    return source


def _notes(source: Source) -> Iterator[str]:
    if source.left_out:
        yield f"{counted(source.left_out.counts.total(), 'file')} left out: {source.left_out}"
    if empty := getattr(source, "empty_folders", ()):
        named = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        yield f"{counted(len(empty), 'subfolder')} without images, no class; later ones have lower numbers: {named}"
    spelled: dict[str, str] = {}
    for label in source.label_names:
        if (other := spelled.setdefault(label.casefold(), label)) != label:
            yield f"the classes {other!r} and {label!r} differ in upper and lower case alone: are they one?"


def _open(text: str, path: Path, files: Collection[str]) -> Source:
    if text.startswith(DATASETS_PREFIX):
        return DatasetSource(text)
    if (path.suffix == ".tar" or "{" in text) and not path.is_dir():
        return TarSource(text)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{text} is not a folder; give a folder with images or with one subfolder per class, WebDataset tars "
            "(shards-{000..099}.tar, or their folder), or datasets:ID for a Hugging Face data set"
        )
    if is_saved_dataset(text):
        return DatasetSource(DATASETS_PREFIX + text)
    if tars := sorted(entry.name for entry in os.scandir(path) if is_tar(entry.name)):
        if image := _first_image(path):
            raise ValueError(
                f"{text} holds tars ({tars[0]}) and images beside them ({image}), and one of the two is the data: name "
                f"a tar, or {text}/{{A,B}}.tar for several, or put the others elsewhere"
            )
        return TarSource(text)
    return FolderSource(text, files)


def _first_image(folder: Path) -> str | None:
    """An image below a folder; None where there is none."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_junk(name)]
        for name in files:
            if not is_junk(name) and os.path.splitext(name)[1].lower() in image_extensions():
                return printable((Path(place) / name).relative_to(folder).as_posix())
    return None


class FolderSource:
    """Images below a folder; the names of its subfolders, sorted, are the classes. A flat folder has none.

    Args:
        folder: links in it are followed.
        files: that it held before; those that are gone keep their places, and cannot be read.

    Raises:
        FileNotFoundError: when the folder is missing.
        ValueError: when it holds no images, or images both beside and inside subfolders.
    """

    def __init__(self, folder: str | Path, files: Collection[str] = ()):
        self.name, self._folder, self.changed = str(folder), Path(folder), list[int]()
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give one with images, or with one subfolder per class")
        self.left_out, subfolders = LeftOut(), list[str]()
        self._paths = {printable(path): path for path in self._images_below("", (), subfolders)}
        classes: dict[str, list[str]] = {}
        spelled: dict[str, str] = {}
        for file in sorted({*self._paths, *files}):
            top, _, rest = file.partition("/")
            name = spelled.setdefault(composed(top), top) if rest else ""
            classes.setdefault(name, []).append(file)
        flat = classes.pop("", [])
        self.empty_folders = tuple(sorted({*map(printable, subfolders)} - {*spelled.values(), *spelled}))
        """Subfolders that hold no images, and so are no classes."""
        if flat and classes:
            raise ValueError(
                f"{folder} holds {len(flat)} images beside {len(classes)} subfolders with images; put every image into "
                "the subfolder of its class, or all of them into one flat folder"
            )
        if not flat and not classes:
            there = f"; left out: {self.left_out}" if self.left_out else ""
            raise ValueError(f"{folder} holds no images, neither flat nor in subfolders{there}")
        self.label_names = tuple(sorted(classes))
        self._files = flat + [file for name in self.label_names for file in classes[name]]
        sizes = [len(classes[name]) for name in self.label_names] or [len(flat)]
        self.labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)

    def _images_below(self, sub: str, above: tuple[tuple[int, int], ...], subfolders: list[str]) -> Iterator[str]:
        """Paths of the images below a subfolder, without a stat of each file; the first level's folders."""
        here = self._folder / sub
        status = here.stat()
        if (status.st_dev, status.st_ino) in above:
            self.left_out.add("link to a folder above itself", sub)
            return
        above = (*above, (status.st_dev, status.st_ino))
        folders = []
        with os.scandir(here) as entries:
            for entry in entries:
                path = f"{sub}/{entry.name}" if sub else entry.name
                kind = _kind(entry)
                if is_junk(entry.name):
                    count = sum(len(files) for _, _, files in os.walk(entry.path)) if kind == "folder" else 1
                    self.left_out.add(JUNK_REASON, path, count)
                elif kind == "folder":
                    folders.append(path)
                elif kind:
                    self.left_out.add(kind, path)
                elif os.path.splitext(entry.name)[1].lower() in image_extensions():
                    yield path
                else:
                    self.left_out.add_ending(path)
        if not sub:
            subfolders += folders
        for folder in folders:
            yield from self._images_below(folder, above, subfolders)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> str:
        return self._files[index]

    def read(self, index: int) -> bytes:
        file = self._files[index]
        return (self._folder / self._paths.get(file, file)).read_bytes()


def _kind(entry: os.DirEntry[str]) -> str:
    """Of an entry of a folder: "" for a file, "folder", or why it is neither."""
    try:
        return "" if entry.is_file() else "folder" if entry.is_dir() else "link to nothing, or no file"
    except OSError:                                                             # a link to itself
        return "link to nothing, or no file"


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
