"""WebDataset tars as a source of image files: bytes, names and labels, nothing decoded. No torch here."""

from __future__ import annotations

import math
import os
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lamamba.data.image_files import (
    JUNK_REASON,
    LeftOut,
    image_extensions,
    is_junk,
    number_classes,
    printable,
    sizes_and_times,
)
from lamamba.utils.text import counted, shown

MAX_CLASS_BYTES = 1000
"""Of a .cls file: more is something else."""
MAX_TARS = 1_000_000
"""That a pattern may name."""
MAX_PADDING = 2 << 20
"""Bytes after the end of a tar that may be zero."""


def is_tar(name: str) -> bool:
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
            tars = [entry.path for entry in entries if is_tar(entry.name)]
            for entry in entries:
                if is_junk(entry.name) or not is_tar(entry.name):
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
        self.changed = sizes_and_times(tars)
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
        self.label_names, self.labels = number_classes(name, [word for word in classes if word is not None])
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
