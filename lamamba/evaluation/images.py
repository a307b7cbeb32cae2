"""Image sets to evaluate: folders, npz files, arrays, digits, a sampler. All are read by ranges of indices."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lamamba.data.digits import Digits
from lamamba.data.images import DECODERS, BadImage, centre_crop, decode
from lamamba.data.sources import Source, open_source
from lamamba.utils.text import counted


class Images(Protocol):
    """A set of images of one size."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What identifies them in the protocol: at least "kind" and "fingerprint"."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, channels (1: grey, 3: colour)."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: range) -> np.ndarray:
        """uint8 (n, h, w, c)."""
        ...

    def classes(self, indices: range) -> np.ndarray | None:
        """Classes that they were conditioned on, (n,); None where there are none or they are unknown."""
        ...


def digest(*parts: object) -> str:
    """SHA-256 of values by their JSON text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class FolderImages:
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
        self._count = min(len(self._source), limit or len(self._source))
        self.shape = self._open(0).shape
        if size is not None and self.shape[2] == 3:
            self._channels = 3
        sizes, times = [], []
        for k in range(self._count):
            file = Path(folder) / self._source.file(k)
            stat = file.stat() if file.is_file() else None                      # files in tars have none
            sizes.append((self._source.file(k), stat.st_size if stat else 0))
            times.append(stat.st_mtime_ns if stat else 0)
        self.metadata: dict[str, Any] = {
            "kind": "files", "name": str(folder), "fingerprint": digest(sizes, self.shape), "changed": digest(times),
        }

    def __len__(self) -> int:
        return self._count

    def _open(self, k: int) -> np.ndarray:
        file, content = self._source.file(k), self._source.read(k)
        channels = self._channels or (1 if _is_grey(content) else 3)
        try:
            image, _ = decode(content, channels)
        except BadImage as error:
            raise ValueError(f"{self._source.name}: {file} is no good image ({error}); take it out") from error
        if self._size is not None and image.size != (self._size, self._size):
            image = centre_crop(image, self._size)
        return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)

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

    def classes(self, indices: range) -> None:
        return None


def _is_grey(content: bytes) -> bool:
    """Whether a file holds grey levels; False for what cannot be opened, which `decode` then explains."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.mode in ("L", "LA", "1") or image.mode.startswith("I")
    except (OSError, SyntaxError, ValueError):
        return False


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]} {'grey' if shape[2] == 1 else 'colour'}"


class NpzImages:
    """The uint8 images of an npz file, as ADM's evaluator reads them: arr_0, (n, h, w, 3).

    Never loaded whole, but for those stored by columns.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it is damaged, holds no such images, or holds pickled objects, which are never loaded.
    """

    def __init__(self, path: str | Path, name: str = "arr_0", limit: int | None = None):
        self._path, self._name = Path(path), name
        shape, dtype = npz_entries(path).get(name, ((), np.dtype(bool)))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            what = f"{dtype} {shape}" if shape else "nothing"
            raise ValueError(f"{path} has {what} under {name!r}; samples are uint8 images (n, height, width, 3)")
        self._count = min(shape[0], limit or shape[0])
        self.shape = (shape[1], shape[2], shape[3])
        self._stream: Any = None
        self._at = 0
        with zipfile.ZipFile(path) as archive:
            checksum = archive.getinfo(f"{name}.npy").CRC
            with archive.open(f"{name}.npy") as stream:
                self._whole = npz_array(path, name) if _header(stream)[2] else None
        self.metadata: dict[str, Any] = {
            "kind": "npz", "name": str(path), "fingerprint": digest(shape, checksum, self._count),
        }

    def __len__(self) -> int:
        return self._count

    def read(self, indices: range) -> np.ndarray:
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[indices.start : indices.stop])
        size = int(np.prod(self.shape))
        try:
            if self._stream is None or self._at > indices.start:
                self._stream = zipfile.ZipFile(self._path).open(f"{self._name}.npy")  # noqa: SIM115 (kept open for the next range)
                _header(self._stream)
                self._at = 0
            while self._at < indices.start:                                      # compressed: no random access
                skipped = min(indices.start - self._at, 256)
                self._stream.read(skipped * size)
                self._at += skipped
            content = self._stream.read(len(indices) * size)
        except _DAMAGE as error:
            raise ValueError(f"{self._path} is damaged near image {self._at} ({error}); fetch it again") from error
        if len(content) != len(indices) * size:
            raise ValueError(f"{self._path} ends before image {indices.stop}; make or fetch it again")
        self._at = indices.stop
        return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(len(indices), *self.shape)

    def classes(self, indices: range) -> None:
        return None


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


class ArrayImages:
    """Images in memory, uint8 (n, h, w, 1 or 3)."""

    def __init__(self, images: np.ndarray, limit: int | None = None):
        self._images = images[:limit]
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        content = hashlib.sha256(np.ascontiguousarray(self._images).data).hexdigest()
        self.metadata = {"kind": "array", "name": "array", "fingerprint": digest(self._images.shape, content)}

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: range) -> np.ndarray:
        return self._images[indices.start : indices.stop]

    def classes(self, indices: range) -> np.ndarray | None:
        return None


class DigitImages(ArrayImages):
    """Real digits, enlarged to a multiple of 8 pixels."""

    def __init__(self, image_size: int = 8, limit: int | None = None):
        digits = Digits(image_size)
        super().__init__(digits.images.transpose(0, 2, 3, 1), limit)
        self._labels = digits.labels
        self.metadata = {"kind": "digits", "name": "digits", "fingerprint": digest("digits", image_size, len(self))}

    def classes(self, indices: range) -> np.ndarray:
        return self._labels[indices.start : indices.stop]


class GeneratedImages:
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
        self._generate, self._seeds, self._labels, self.shape = generate, seeds, labels, shape
        described = {**metadata, "kind": "generated", "seeds": [seeds[0], seeds[-1]]}
        self.metadata = {**described, "fingerprint": digest(described, labels)}

    def __len__(self) -> int:
        return len(self._seeds)

    def read(self, indices: range) -> np.ndarray:
        chosen = slice(indices.start, indices.stop)
        return self._generate(self._seeds[chosen], None if self._labels is None else self._labels[chosen])

    def classes(self, indices: range) -> np.ndarray | None:
        return None if self._labels is None else np.array(self._labels[indices.start : indices.stop])


class _Converted:
    """Images with other channels."""

    def __init__(self, images: Images, channels: int):
        self._images, self.metadata = images, images.metadata
        self.shape = (*images.shape[:2], channels)

    def __len__(self) -> int:
        return len(self._images)

    def classes(self, indices: range) -> np.ndarray | None:
        return self._images.classes(indices)


class AsGrey(_Converted):
    """The first channel of colour images whose channels are equal: npz files hold three also of grey models."""

    def __init__(self, images: Images, network: str):
        super().__init__(images, 1)
        self._network = network

    def read(self, indices: range) -> np.ndarray:
        images = self._images.read(indices)
        if (images != images[..., :1]).any():
            name = self.metadata.get("name")
            raise ValueError(f"{name} has colour images and {self._network} reads grey ones; choose other features")
        return images[..., :1]


class AsColour(_Converted):
    """Grey images with the channel three times."""

    def read(self, indices: range) -> np.ndarray:
        return self._images.read(indices).repeat(3, axis=3)


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
    if images.shape[2] == 3 and images.metadata.get("kind") != "generated":
        return AsGrey(images, network)
    if images.shape[2] == 3:
        raise ValueError(f"{name} has colour images and {network} reads grey ones; choose other features")
    if not repeat_grey:
        raise ValueError(
            f"{name} has grey images and {network} reads colour; grey='repeat' gives it three equal channels, which is "
            "not what published figures mean"
        )
    return AsColour(images, 3)
