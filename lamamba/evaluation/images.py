"""Image sets to evaluate: folders, npz files, arrays, digits, a sampler. All are read by ranges of indices."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lamamba.data.digits import Digits
from lamamba.data.images import DECODERS, BadImage, centre_crop, read_image
from lamamba.data.sources import Source, open_source
from lamamba.utils.text import counted


class Images(ABC):
    """A set of images of one size."""

    count: int
    shape: tuple[int, ...]
    """Height, width, channels (1: grey, 3: colour)."""
    metadata: dict[str, Any]
    """What identifies them in the protocol: at least "kind" and "fingerprint"."""

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def read(self, indices: range) -> np.ndarray:
        """uint8 (n, h, w, c)."""

    def classes(self, indices: range) -> np.ndarray | None:
        """Classes that they were conditioned on, (n,); None where there are none or they are unknown."""
        return None


def digest(*parts: object) -> str:
    """SHA-256 of values by their JSON text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class FolderImages(Images):
    """Image files below a folder (or in tars), sorted by name.

    Args:
        folder: the folder, or tars.
        limit: use only so many, the first ones.
        size: side to which images of any size are cropped and scaled, as training does; by default all have one size.
        channels: to which they are converted: 1 or 3; by default all are as the first one, with `size` grey ones among
            colours become colour.

    Raises:
        FileNotFoundError, ValueError: when there are none.
    """

    def __init__(
        self, folder: str | Path, limit: int | None = None, size: int | None = None, channels: int | None = None
    ):
        self._source: Source = open_source(folder)
        self._size, self._channels = size, channels
        self.count = min(len(self._source), limit or len(self._source))
        self.shape = self._open(0).shape
        if size is not None and self.shape[2] == 3:
            self._channels = 3
        sizes, times = [], []
        for k in range(self.count):
            file = Path(folder) / self._source.file(k)
            stat = file.stat() if file.is_file() else None                      # files in tars have none
            sizes.append((self._source.file(k), stat.st_size if stat else 0))
            times.append(stat.st_mtime_ns if stat else 0)
        self.metadata = {
            "kind": "files", "name": str(folder), "fingerprint": digest(sizes, self.shape),
            "changed": digest(times + self._source.changed),
        }

    def _open(self, k: int) -> np.ndarray:
        try:
            image, _ = read_image(self._source, k, self._channels)
        except BadImage as error:
            file = self._source.file(k)
            raise ValueError(f"{self._source.name}: {file} is no good image ({error}); take it out") from error
        if self._size is not None and image.size != (self._size, self._size):
            image = centre_crop(image, self._size)
        return np.atleast_3d(np.asarray(image, dtype=np.uint8))

    def read(self, indices: range) -> np.ndarray:
        with ThreadPoolExecutor(DECODERS) as pool:
            images = list(pool.map(self._open, indices))
        for k, image in zip(indices, images, strict=True):
            if image.shape != self.shape:
                raise ValueError(
                    f"{self._source.name}: {self._source.file(k)} is {_words(image.shape)}, {self._source.file(0)} is "
                    f"{_words(self.shape)}; all images of a set have one size and one kind. lamamba evaluate stats "
                    f"{self._source.name} --image-size N --out FILE.npz crops them as training does"
                )
        return np.stack(images)


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]} {'grey' if shape[2] == 1 else 'colour'}"


class NpzImages(Images):
    """The uint8 images of an npz file, as ADM's evaluator reads them: arr_0, (n, h, w, 3).

    Never loaded whole, but for those stored by columns.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it is damaged, holds no such images, or holds pickled objects, which are never loaded.
    """

    def __init__(self, path: str | Path, limit: int | None = None):
        self._path = Path(path)
        shape, dtype = npz_entries(path).get("arr_0", ((), np.dtype(bool)))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            what = f"{dtype} {shape}" if shape else "nothing"
            raise ValueError(f"{path} has {what} under 'arr_0'; samples are uint8 images (n, height, width, 3)")
        self.count, self.shape = min(shape[0], limit or shape[0]), shape[1:]
        self._stream: Any = None
        self._first = 0                                                         # byte of image 0 in the stream
        with zipfile.ZipFile(path) as archive:
            checksum = archive.getinfo("arr_0.npy").CRC
            with archive.open("arr_0.npy") as stream:
                self._whole = npz_array(path, "arr_0") if _header(stream)[2] else None
        self.metadata = {"kind": "npz", "name": str(path), "fingerprint": digest(shape, checksum, self.count)}

    def read(self, indices: range) -> np.ndarray:
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[indices.start : indices.stop])
        size = int(np.prod(self.shape))
        try:
            if self._stream is None:
                self._stream = zipfile.ZipFile(self._path).open("arr_0.npy")    # noqa: SIM115 (kept for the next range)
                _header(self._stream)
                self._first = self._stream.tell()
            self._stream.seek(self._first + indices.start * size)               # of compressed ones, by reading
            content = self._stream.read(len(indices) * size)
        except _DAMAGE as error:
            raise ValueError(f"{self._path} is damaged near image {indices.start} ({error}); fetch it again") from error
        if len(content) != len(indices) * size:
            raise ValueError(f"{self._path} ends before image {indices.stop}; make or fetch it again")
        return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(len(indices), *self.shape)


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, type, and whether the array is stored by columns (Fortran's order)."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, dtype, fortran and len(shape) > 1


_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError, KeyError, RuntimeError,
    SyntaxError, OverflowError, MemoryError,
)
"""What zipfile and NumPy raise for damaged files."""


def npz_entries(path: str | Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and types of an npz file's arrays, without loading one.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it is damaged, or an array of it is pickled.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    entries = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    with archive.open(member) as stream:
                        shape, dtype, _ = _header(stream)
                        if math.prod(shape) * dtype.itemsize > member.file_size:
                            raise ValueError(f"{member.filename} is shorter than its shape {shape} says")
                        entries[member.filename.removesuffix(".npy")] = shape, dtype
    except PermissionError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or no npz file ({error}); make or fetch it again") from error
    for name, (_, dtype) in entries.items():
        if dtype.hasobject:
            raise ValueError(f"{path} holds pickled objects under {name!r}; they could execute anything: never loaded")
    return entries


def npz_array(path: str | Path, name: str) -> np.ndarray:
    """One array of an npz file, whole; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except _DAMAGE as error:
        raise ValueError(f"{path}: {name!r} is missing or damaged ({error}); make or fetch it again") from error


class ArrayImages(Images):
    """Images in memory, uint8 (n, h, w, 1 or 3)."""

    def __init__(self, images: np.ndarray, limit: int | None = None):
        self._images = images[:limit]
        self.count, self.shape = len(self._images), images.shape[1:]
        content = hashlib.sha256(np.ascontiguousarray(self._images).data).hexdigest()
        self.metadata = {"kind": "array", "name": "array", "fingerprint": digest(self._images.shape, content)}

    def read(self, indices: range) -> np.ndarray:
        return self._images[indices.start : indices.stop]


class DigitImages(ArrayImages):
    """Real digits, enlarged to a multiple of 8 pixels."""

    def __init__(self, image_size: int = 8, limit: int | None = None):
        digits = Digits(image_size)
        super().__init__(digits.images.transpose(0, 2, 3, 1), limit)
        self._labels = digits.labels
        self.metadata = {"kind": "digits", "name": "digits", "fingerprint": digest("digits", image_size, len(self))}

    def classes(self, indices: range) -> np.ndarray:
        return self._labels[indices.start : indices.stop]


class GeneratedImages(Images):
    """Images that are sampled when they are read.

    Args:
        generate: seeds and classes (None for unconditional models) to uint8 images (n, h, w, c).
        seeds: image k is made from seeds[k].
        labels: the class of each image; None for unconditional models.
        metadata: of the model and the sampler.
        shape: of one image.
    """

    def __init__(
        self, generate: Callable[[range, Sequence[int] | None], np.ndarray], seeds: range,
        labels: Sequence[int] | None, *, metadata: Mapping[str, Any], shape: tuple[int, int, int],
    ):
        self._generate, self._seeds, self._labels = generate, seeds, labels
        self.count, self.shape = len(seeds), shape
        described = {**metadata, "kind": "generated", "seeds": [seeds[0], seeds[-1]]}
        self.metadata = {**described, "fingerprint": digest(described, labels)}

    def read(self, indices: range) -> np.ndarray:
        chosen = slice(indices.start, indices.stop)
        return self._generate(self._seeds[chosen], None if self._labels is None else self._labels[chosen])

    def classes(self, indices: range) -> np.ndarray | None:
        return None if self._labels is None else np.array(self._labels[indices.start : indices.stop])


class _Converted(Images):
    """Images with other channels: grey ones with the channel three times, or the first of three equal channels.

    npz files hold three channels also of grey models. `refusal` is raised where they are not equal.
    """

    def __init__(self, images: Images, channels: int, refusal: ValueError):
        self._images, self._refusal = images, refusal
        self.count, self.metadata, self.shape = len(images), images.metadata, (*images.shape[:2], channels)

    def read(self, indices: range) -> np.ndarray:
        images = self._images.read(indices)
        if self.shape[2] == 3:
            return images.repeat(3, axis=3)
        if (images != images[..., :1]).any():
            raise self._refusal
        return images[..., :1]

    def classes(self, indices: range) -> np.ndarray | None:
        return self._images.classes(indices)


def fit_channels(images: Images, channels: int, network: str, *, repeat_grey: bool) -> Images:
    """Images with the channels that a feature network takes.

    Args:
        images: at least two.
        channels, network: of the feature network: 1 or 3, and its name.
        repeat_grey: whether grey images may get three equal channels.

    Raises:
        ValueError: when they are fewer than two, or their channels do not fit. Whether existing images of three
            channels are grey is known only when they are read.
    """
    name = images.metadata.get("name", "the model's samples")
    if len(images) < 2:
        raise ValueError(f"{name} has {counted(len(images), 'image')}; distances between sets need at least 2 of each")
    if images.shape[2] == channels:
        return images
    refusal = ValueError(f"{name} has colour images and {network} reads grey ones; choose other features")
    if images.shape[2] == 3 and images.metadata.get("kind") == "generated":
        raise refusal
    if images.shape[2] == 1 and not repeat_grey:
        raise ValueError(
            f"{name} has grey images and {network} reads colour; grey='repeat' gives it three equal channels, which is "
            "not what published figures mean"
        )
    return _Converted(images, channels, refusal)
