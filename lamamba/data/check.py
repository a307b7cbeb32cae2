"""Looking at every file of an image folder before training does, and remembering what is wrong with which.

    folder/lamamba-check.json       written by `lamamba data check`, read by ImageFolder: files named there are skipped
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

MANIFEST = "lamamba-check.json"
MANIFEST_VERSION = 1
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST_SIDE = 2
"""Pixels; one pixel more than what stands in for missing pictures on the web."""
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa")
"""PIL's modes that become RGB or grey without loss of meaning."""
CHUNK = 32

KINDS = {
    "empty": "the file has no bytes",
    "not an image": "no known image format",
    "truncated": "the file ends early, or is damaged within",
    "too small": f"a side has fewer than {SMALLEST_SIDE} pixels",
    "decompression bomb": "far more pixels than any photograph",
    "CMYK": "ink colours, whose screen colours depend on a profile: convert the file to RGB",
    "16-bit": "more than 8 bits a channel, which would be cut off: convert the file to 8 bits",
    "other colours": "a colour space that is neither grey nor RGB: convert the file to RGB",
    "unreadable": "the system does not let us read it",
}


def find_images(folder: Path) -> tuple[list[Path], tuple[str, ...], list[int]]:
    """Images of a folder, its classes (subfolders with images, sorted; none if it is flat), and each image's label.

    Raises:
        FileNotFoundError: when the folder is missing.
        ValueError: when it holds no images, or images both beside and inside subfolders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one with images, or with one subfolder per class")
    flat = sorted(path for path in folder.iterdir() if _is_image(path))
    below = {sub: sorted(path for path in sub.rglob("*") if _is_image(path))
             for sub in sorted(folder.iterdir()) if sub.is_dir()}
    classes = {sub.name: paths for sub, paths in below.items() if paths}
    if flat and classes:
        raise ValueError(
            f"{folder} holds {len(flat)} images beside {len(classes)} subfolders with images; put every image into "
            "the subfolder of its class, or all of them into one flat folder"
        )
    if not flat and not classes:
        raise ValueError(f"{folder} holds no images ({', '.join(EXTENSIONS)}), neither flat nor in subfolders")
    paths = flat + [path for paths in classes.values() for path in paths]
    labels = [0] * len(flat) + [label for label, paths in enumerate(classes.values()) for _ in paths]
    return paths, tuple(classes), labels


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def fault_of(path: Path) -> tuple[str, str] | None:
    """What keeps a file from training, as one of KINDS and the reader's own words; None for a good one.

    The whole file is decoded: many damaged ones open without complaint.
    """
    try:
        if path.stat().st_size == 0:
            return "empty", KINDS["empty"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                size, mode = image.size, image.mode
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return "decompression bomb", str(error)
    except UnidentifiedImageError:
        return "not an image", KINDS["not an image"]
    except PermissionError as error:
        return "unreadable", str(error)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        return "truncated", str(error)
    if min(size) < SMALLEST_SIDE:
        return "too small", f"{size[0]} x {size[1]} pixels"
    if mode == "CMYK":
        return "CMYK", KINDS["CMYK"]
    if mode.startswith("I") or mode == "F":
        return "16-bit", f"mode {mode}: {KINDS['16-bit']}"
    if mode not in EIGHT_BITS:
        return "other colours", f"mode {mode}: {KINDS['other colours']}"
    return None


def _faults_of(paths: Sequence[Path]) -> list[tuple[str, str] | None]:
    return [fault_of(path) for path in paths]


@dataclass(frozen=True)
class FolderCheck:
    """What was found in a folder."""

    folder: str
    images: int
    """Files looked at, good or bad."""
    classes: Mapping[str, int]
    """Good images of each class; empty where there are no classes."""
    bad: Mapping[str, tuple[str, str]]
    """Path below the folder: kind and reason."""

    @property
    def kinds(self) -> Counter[str]:
        """How many bad files there are of each kind."""
        return Counter(kind for kind, _ in self.bad.values())

    def to_dict(self) -> dict[str, Any]:
        bad = {name: {"kind": kind, "reason": reason} for name, (kind, reason) in self.bad.items()}
        return {
            "version": MANIFEST_VERSION, "images": self.images, "good": self.images - len(self.bad),
            "classes": dict(self.classes), "bad": bad,
        }


def check_folder(
    folder: str | Path, *, workers: int | None = None, on_progress: Callable[[int, int], None] = lambda done, all: None
) -> FolderCheck:
    """Decode every image of a folder.

    Args:
        folder: with images, or one subfolder per class.
        workers: processes; by default one for each processor.
        on_progress: told (files done, files in all).

    Raises:
        FileNotFoundError, ValueError: as `find_images`.
    """
    folder = Path(folder)
    paths, names, labels = find_images(folder)
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    faults: list[tuple[str, str] | None] = []
    if workers == 1:
        for chunk in chunks:
            faults += _faults_of(chunk)
            on_progress(len(faults), len(paths))
    else:                                                                       # fork would copy torch's threads
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for found in pool.map(_faults_of, chunks):
                faults += found
                on_progress(len(faults), len(paths))
    bad = {
        path.relative_to(folder).as_posix(): fault for path, fault in zip(paths, faults, strict=True) if fault
    }
    good = Counter(label for label, fault in zip(labels, faults, strict=True) if not fault)
    return FolderCheck(str(folder), len(paths), {name: good[i] for i, name in enumerate(names)}, bad)


def known_bad(folder: Path) -> dict[str, str]:
    """Files that an earlier check found bad, with their kind; none where there was no check.

    Raises:
        ValueError: when the manifest is damaged or of a newer format.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return {}
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        version, bad = values["version"], {name: fault["kind"] for name, fault in values["bad"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is damaged ({error}); remove it, or run lamamba data check {folder}") from error
    if version > MANIFEST_VERSION:
        raise ValueError(
            f"{manifest} has format version {version}, this lamamba reads up to {MANIFEST_VERSION}; upgrade it, or run "
            f"lamamba data check {folder} again"
        )
    return bad
