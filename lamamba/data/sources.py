"""Sources of image files: folders, WebDataset tars, Hugging Face data sets. Bytes, names and labels, nothing decoded.

No torch here: processes that check images start quickly.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lamamba.data.labels import composed
from lamamba.utils.text import counted, shown

logger = logging.getLogger("lamamba.data")

DATASETS_PREFIX = "datasets:"
MANIFEST_NAME = "lamamba-manifest.json"
LABEL_COLUMNS = ("label", "labels", "class", "target")
"""Columns of data sets that hold classes, if they are words or whole numbers."""
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
MAX_CLASS_BYTES = 1000
"""Of a .cls file: more is something else."""
MAX_TARS = 1_000_000
"""That a pattern may name."""
MAX_PADDING = 2 << 20
"""Bytes after the end of a tar that may be zero."""
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
    if tars := sorted(entry.name for entry in os.scandir(path) if _is_tar(entry.name)):
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


def _sizes_and_times(files: Iterable[str]) -> list[int]:
    return [value for stat in map(os.stat, files) for value in (stat.st_size, stat.st_mtime_ns)]


def _is_tar(name: str) -> bool:
    return name.endswith(".tar") and not is_junk(name)


class TarSource:
    """Uncompressed WebDataset tars: files of one sample share a name up to its first dot (a.jpg, a.cls).

    `.cls` holds the class, a number or a word. An image with more dots (a.b.jpg) has the class of a.b.cls, else of
    a.cls; beside an image of the name alone (a.jpg) it is another file of that sample, as masks are, and left out.
    Where a name comes again in a tar, a new sample begins. Tars are read in place: offset and size of each image are
    listed at the start, so that images can be read in any order.

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
        self.name, self.left_out = name, LeftOut()
        if os.path.isdir(name):
            entries = sorted(os.scandir(name), key=lambda entry: entry.name)
            tars = [entry.path for entry in entries if _is_tar(entry.name)]
            for entry in entries:
                if is_junk(entry.name) or not _is_tar(entry.name):
                    self.left_out.add_ending(entry.name)
        else:
            check_ranges(name)
            tars = list(expand_urls(name))
        self._tars, names = tars, [os.path.basename(tar) for tar in tars]
        self._names = list(map(printable, names if len({*names}) == len(names) else tars))
        for tar in tars:
            if not os.path.isfile(tar):
                hint = " (patterns have braces, as in shards-{000..099}.tar)" if re.search(r"[*?\[]", tar) else ""
                raise FileNotFoundError(f"{tar} does not exist; {name} names {counted(len(tars), 'tar')}{hint}")
        self.changed = _sizes_and_times(tars)
        with ThreadPoolExecutor(max_workers=8) as pool:
            tables = list(pool.map(_read_table, tars))
        rows = [(number, *row) for number, (table, _) in enumerate(tables) for row in table]
        for _, left_out in tables:
            self.left_out.update(left_out)
        if not rows:
            raise ValueError(f"{name} holds no images" + (f"; left out: {self.left_out}" if self.left_out else ""))
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
        self.label_names, self.labels = _number_classes(name, [word for word in classes if word is not None])
        if unlabelled:
            self.labels = np.zeros(len(classes), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> str:
        return f"{self._names[self._locations[index, 0]]}/{self._files[index]}"

    def read(self, index: int) -> bytes:
        tar, offset, size = self._locations[index]
        with open(self._tars[tar], "rb") as file:
            file.seek(offset)
            return file.read(size)


def check_ranges(name: str) -> None:
    """Check that a pattern of tars names no more than MAX_TARS.

    Raises:
        ValueError: when its ranges are longer.
    """
    ranges = re.findall(r"\{(\d{1,4000})\.\.(\d{1,4000})", name)
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)
    if count > MAX_TARS:
        raise ValueError(f"{name:.100} names more than {MAX_TARS:,} tars: shorten its ranges")


def _number_classes(source: str, classes: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
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


_Row = tuple[str, int, int, str | None]
"""Name, offset, size and class of an image in a tar."""


def _read_table(tar: str) -> tuple[list[_Row], LeftOut]:
    """The images of a tar, and what else is in it."""
    images, classes, left_out = list[tuple[str, int, int, int]](), dict[tuple[str, int], str](), LeftOut()
    times: Counter[str] = Counter()
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name, ending = os.path.splitext(member.name)
                if member.isdir():
                    continue
                time = times[member.name] = times[member.name] + 1
                if is_junk(member.name):
                    left_out.add(JUNK_REASON, member.name)
                elif not member.isfile() or member.issparse():
                    left_out.add("link, or no file", member.name)
                elif ending.lower() in image_extensions():
                    images.append((member.name, time, member.offset_data, member.size))
                elif ending.lower() == ".cls":
                    classes[name, time] = _read_class(archive, member)
                else:
                    left_out.add_ending(member.name)
            _check_end(Path(tar), archive.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:   # as of a size beyond the disk's
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"{tar} is damaged, compressed or no tar ({error}); write it again, without compression"
        ) from error
    plain = {os.path.splitext(name)[0] for name, *_ in images}
    rows = []
    for name, time, offset, size in images:
        stem, key = os.path.splitext(name)[0], _key(name)
        if stem != key and key in plain:
            left_out.add("further images of a sample", name)
            continue
        word = classes.get((stem, time)) or classes.get((key, time)) or None
        rows.append((printable(name) if time == 1 else f"{printable(name)}#{time}", offset, size, word))
    return rows, left_out


def _read_class(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The class in a .cls file; "" for an empty one.

    Raises:
        ValueError: when it is no word or number in a line.
    """
    if member.size > MAX_CLASS_BYTES:
        raise ValueError(f"{member.name} has {member.size:,} bytes, and a class is a number or a word")
    held = archive.extractfile(member)
    word = held.read().decode("utf-8-sig").strip() if held else ""
    if printable(word) != word:
        raise ValueError(f"{member.name} holds {shown(word)}, and a class is a number or a word in one line")
    return word


def _check_end(tar: Path, offset: int) -> None:
    """Check that a tar ends where reading it ended: tarfile takes a damaged header for the end.

    Raises:
        tarfile.ReadError: when there are more than zeros.
    """
    with tar.open("rb") as file:
        file.seek(offset)
        rest = file.read(MAX_PADDING)
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise tarfile.ReadError(f"byte {offset:,} begins no file, and those after it would be lost")
    if rest.strip(b"\0"):
        raise tarfile.ReadError(f"more follows its end at byte {offset:,}, as where cat has joined tars")


def _key(name: str) -> str:
    """WebDataset's key of a sample: the path up to the first dot in its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


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
        self.changed = _sizes_and_times(file["filename"] for file in loaded.cache_files)
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
        return _number_classes(self.name, [str(int(value)) if isinstance(value, int) else value for value in held])

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
