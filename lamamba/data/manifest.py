"""Decoding every file of a source, and the manifest: which files are bad, which are converted."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from lamamba.data.hub_sets import DATASETS_PREFIX, dataset_place, is_saved_dataset
from lamamba.data.image_files import MANIFEST_NAME
from lamamba.data.images import MIN_SIDE, BadImage, read_image
from lamamba.data.sources import Source, fingerprint
from lamamba.options.base import checked, read_record, record
from lamamba.utils.files import write_json

MANIFEST_VERSION = 1
CHUNK = 32
"""Files per task of a worker process."""
NAMED_CONVERTED = 1000
"""Converted files that a manifest lists."""


@checked
@dataclass(frozen=True)
class FoundFile:
    """A bad or converted file, and what was found."""

    file: str
    kind: str
    detail: str


@record
class Manifest:
    """What `lamamba data check` found in a source."""

    source: str
    """The source's name."""
    fingerprint: str
    """SHA-256 of the names, classes and order of all files, bad ones included."""
    images: int
    """Files checked."""
    label_names: tuple[str, ...]
    images_per_class: tuple[int, ...]
    """Files of each class, bad ones included; one number where there are no classes."""
    bad: tuple[FoundFile, ...]
    """Files that training excludes, in the source's order."""
    converted: dict[str, int] = field(default_factory=dict)
    """Files that are used after a conversion, by kind: CMYK, 16-bit, transparent."""
    converted_files: tuple[FoundFile, ...] = ()
    """The first of them."""
    min_side: int = MIN_SIDE
    """Images with fewer pixels on a side count as too small."""
    version: int = MANIFEST_VERSION

    def save(self, path: Path) -> None:
        """Write the manifest, by an atomic rename."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            ValueError: when it is missing, damaged or of a newer format.
        """
        try:
            return read_record(cls, path, MANIFEST_VERSION)
        except ValueError as error:
            raise ValueError(f"{error}; lamamba data check makes the manifest anew") from error


def manifest_path(source_name: str) -> Path:
    """Default path of a source's manifest: in its folder, beside its tars, or in the working directory for a hub id.

    Tars have their own, by their name: training and validation often lie in one folder. So have splits of a saved data
    set, but for "train".
    """
    path = Path(source_name)
    if path.is_dir():
        return path / MANIFEST_NAME
    if source_name.startswith(DATASETS_PREFIX) and is_saved_dataset((found := dataset_place(source_name))[0]):
        place, split = found
        return Path(place) / (MANIFEST_NAME if split == "train" else _name_for(split))
    return path.parent / _name_for(path.stem) if path.suffix == ".tar" else Path(_name_for(source_name))


def _name_for(name: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"{plain}-{MANIFEST_NAME}"


def _older_path(source_name: str) -> Path | None:
    """Where the manifest of tars once was, one for all of a folder, and that of a saved data set, in the working
    directory; None where that is not of these."""
    path = Path(source_name).parent / MANIFEST_NAME if Path(source_name).suffix == ".tar" else None
    if source_name.startswith(DATASETS_PREFIX):
        path = Path(_name_for(source_name))
    return path if path is not None and path.is_file() and Manifest.load(path).source == source_name else None


class CheckedFile(NamedTuple):
    """Result of decoding a file."""

    number: int
    kind: str = ""
    """Of the fault; empty: none."""
    detail: str = ""
    conversion: str = ""
    """Kind of conversion that was needed; empty: none."""


_checked: tuple[Source, int] | None = None
"""In a worker process: the source and min_side."""


def _begin(source: Source, min_side: int) -> None:
    global _checked
    _checked = source, min_side


def _check_chunk(indices: range) -> list[CheckedFile]:
    assert _checked is not None
    source, min_side = _checked
    return [_check_file(source, index, min_side) for index in indices]


def _check_file(source: Source, index: int, min_side: int) -> CheckedFile:
    try:
        _, note = read_image(source, index, min_side=min_side)
    except BadImage as error:
        return CheckedFile(index, error.kind, error.detail)
    return CheckedFile(index, conversion=note)


def check_files(source: Source, workers: int | None = None, min_side: int = MIN_SIDE) -> Iterator[CheckedFile]:
    """Decode every file of a source by several processes, and yield the results in the order of the files.

    Args:
        source: of the files.
        workers: processes; by default one per core.
        min_side: images with fewer pixels on the short side are bad.

    Raises:
        RuntimeError: when a process dies, as it does when memory runs out.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(source) <= CHUNK:
        for index in range(len(source)):
            yield _check_file(source, index, min_side)
        return
    chunks = (range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK))
    context = multiprocessing.get_context("spawn")                              # a fork would copy locks that are held
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(source, min_side))
    try:
        waiting = [pool.submit(_check_chunk, chunk) for chunk in itertools.islice(chunks, 4 * workers)]
        while waiting:
            yield from waiting.pop(0).result()
            waiting += [pool.submit(_check_chunk, chunk) for chunk in itertools.islice(chunks, 1)]
    except BrokenProcessPool as error:
        raise RuntimeError(f"a process that checked {source.name} died; fewer workers need less memory") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def make_manifest(
    source: Source, checked: Iterable[CheckedFile], min_side: int = MIN_SIDE, *, strict: bool = False
) -> Manifest:
    """The manifest of a source from the results of `check_files`.

    Args:
        source: of the files.
        checked: results; those of good files may be missing.
        min_side: as the files were checked.
        strict: files that need a conversion are bad.
    """
    bad, converted, files = list[FoundFile](), Counter[str](), list[FoundFile]()
    for number, kind, detail, conversion in checked:
        if kind:
            bad.append(FoundFile(source.file(number), kind, detail))
        elif conversion and strict:
            bad.append(FoundFile(source.file(number), conversion, "would need a conversion"))
        elif conversion:
            converted[conversion] += 1
            if len(files) < NAMED_CONVERTED:
                files.append(FoundFile(source.file(number), conversion, "converted"))
    counts = Counter(source.labels.tolist())
    return Manifest(
        source=source.name, fingerprint=fingerprint(source), images=len(source), label_names=source.label_names,
        images_per_class=tuple(counts[label] for label in range(max(1, len(source.label_names)))), bad=tuple(bad),
        converted=dict(sorted(converted.items())), converted_files=tuple(files), min_side=min_side,
    )


def excluded_files(source: Source, manifest: str | Path | None = None) -> tuple[tuple[str, ...], str | None]:
    """Names of the files that a source's manifest excludes, and a note where the source has changed since.

    Args:
        source: of the files.
        manifest: path; by default that of `manifest_path`, where it exists.

    Raises:
        ValueError: when the manifest is damaged, or the given one is missing.
    """
    path = Path(manifest) if manifest is not None else manifest_path(source.name)
    if manifest is None and not path.is_file():
        if (older := _older_path(source.name)) is None:
            return (), None
        path = older
    found = Manifest.load(path)
    note = None
    if found.fingerprint != fingerprint(source):
        note = (
            f"{source.name} has changed since {path} was written ({found.images} files then, {len(source)} now); its "
            "list of bad files still counts, `lamamba data check` renews it"
        )
    return tuple(bad.file for bad in found.bad), note
