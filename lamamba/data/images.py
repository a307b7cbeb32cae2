"""Images from files: decoding, checks, centre and random crops (ADM), and replacement of files that cannot be decoded.

No torch here: processes that check images start quickly.
"""

from __future__ import annotations

import io
import logging
import math
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from lamamba.data.image_files import image_formats, printable
from lamamba.data.sources import FolderSource, Source, fingerprint

logger = logging.getLogger("lamamba.data")

CACHE_BYTES = 2 << 30
"""Decoded images are kept in memory when the whole set is smaller than this."""
DECODERS = 4
"""Threads that decode the images of one batch."""
MAX_PIXELS = 178_956_970
"""More are a decompression bomb: a small file that fills the memory. Pillow's own bound."""
MAX_ASPECT_RATIO = 64
"""Long over short side; beyond it the resized image, from which the square is cropped, becomes enormous."""
MIN_SIDE = 2
"""Pixels on the short side; smaller files are tracking pixels and lines."""
MIN_CROP_SHARE = 0.8
"""Smallest share of the short side that a random crop shows (ADM)."""
NAMED = 8
"""Bad files that an error names."""

# for the whole process: warnings.catch_warnings in each thread would be a race. _check_size has bounds of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")       # broken metadata beside good pixels

Crop = Literal["centre", "random"]
Kind = Literal[
    "empty", "not an image", "truncated", "damaged", "too small", "too narrow", "decompression bomb", "32-bit",
    "unreadable",
]
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""First bytes of image files; a file that has them and cannot be opened is truncated, others are no images."""


_TURNS = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), strict=True))
"""By the number in EXIF data; 1 is upright."""
_FAULTS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError, RuntimeError,
    MemoryError, AssertionError, struct.error, zlib.error,
)
"""What Pillow's readers raise for damaged files."""


class BadImage(ValueError):
    """A file that cannot be decoded, or not used.

    Args:
        kind: of the fault.
        detail: more about it, in a few words.
    """

    def __init__(self, kind: Kind, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[Kind, str]]:
        return BadImage, (self.kind, self.detail)


class ImageSet(Protocol):
    """Square images of one size, by index, and their classes."""

    name: str
    image_size: int
    """Side in pixels."""
    channels: int
    """1 for grey, 3 for RGB."""
    label_names: tuple[str, ...]
    """One name per class, in the order of the labels; empty where there are no classes."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, channels, image_size, image_size) uint8 and labels (b,) int64, 0 where there are no classes."""
        ...


def decode(content: bytes, channels: int | None = 3, min_side: int = MIN_SIDE) -> tuple[Image.Image, str]:
    """Decode an image file to grey or RGB with 8 bits, turned as its EXIF orientation says.

    CMYK is converted as R = (1 - C)(1 - K) and so on, without a colour profile. 16-bit grey levels are divided by 257
    (Pillow alone would clip them at 255, which turns nearly all of them white); 16-bit colours keep their upper byte.
    Transparent images are laid on white. Of animations the first frame counts. 32-bit images are bad: their range is
    unknown.

    Args:
        content: the file's bytes.
        channels: 1 for grey, 3 for RGB; None for those that the file has.
        min_side: images with fewer pixels on the short side are too small.

    Returns:
        The image, and the kind of conversion: "CMYK", "16-bit", "transparent", or "" for none.

    Raises:
        BadImage: when the file holds no whole image, or one that cannot be used.
    """
    if not content:
        raise BadImage("empty", "0 bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=image_formats())
        _check_size(image.size, min_side)
        image.load()
        return _convert(image, content, channels)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        if content.startswith(_MAGIC):
            raise BadImage("truncated", f"ends within its header, after {len(content)} bytes") from error
        raise BadImage("not an image", f"begins with {content[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise BadImage("decompression bomb", str(error)) from error
    except _FAULTS as error:
        kind: Kind = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "damaged"
        raise BadImage(kind, str(error) or type(error).__name__) from error


def read_image(
    source: Source, index: int, channels: int | None = 3, min_side: int = MIN_SIDE
) -> tuple[Image.Image, str]:
    """`decode` of a file of a source.

    Raises:
        BadImage: when it is gone or unreadable, too.
    """
    try:
        content = source.read(index)
    except OSError as error:
        raise BadImage("unreadable", error.strerror or str(error)) from error
    return decode(content, channels, min_side)


def _convert(image: Image.Image, content: bytes, channels: int | None) -> tuple[Image.Image, str]:
    turned, is_deep = eight_bits(image)
    note = "16-bit" if is_deep else "CMYK" if image.mode == "CMYK" else _deep_colour(content)
    flat = opaque(turned)
    grey = is_deep or image.mode in ("1", "L", "LA", "La") if channels is None else channels == 1
    return flat.convert("L" if grey else "RGB"), note or ("" if flat is turned else "transparent")


def eight_bits(image: Image.Image) -> tuple[Image.Image, bool]:
    """An upright image with grey levels of 8 bits, and whether they were of 16.

    Raises:
        BadImage: for levels of 32 bits.
    """
    turned = upright(image)
    # "I" of PNG: Pillow before 11.3; of PGM: levels that Pillow has spread over 16 bits
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels, hidden = np.asarray(turned), image.info.get("transparency")
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            levels = _full_range(levels, image.tag_v2)
        turned = Image.fromarray(np.round(levels / 257).astype(np.uint8))
        if hidden is not None:
            turned.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
        return turned, True
    if image.mode in ("I", "F"):
        raise BadImage("32-bit", "its range is unknown; save it with 8 or 16 bits")
    return turned, False


def _full_range(levels: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Grey levels of a TIFF over 16 bits, 0 black: Pillow gives those of 12 bits as they are, and leaves white at 0."""
    levels = levels * (65535 / (2 ** tags[TiffImagePlugin.BITSPERSAMPLE][0] - 1))
    return 65535 - levels if tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == 0 else levels


def upright(image: Image.Image) -> Image.Image:
    """An image turned and mirrored as its EXIF orientation says; damaged EXIF data say nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _FAULTS:
        return image
    # not ImageOps.exif_transpose: it writes the other EXIF data anew, and fails where they are damaged
    method = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def opaque(image: Image.Image, background: str = "white") -> Image.Image:
    """An image without transparency, RGB on a background of one colour; itself where no pixel is transparent."""
    if not image.has_transparency_data:
        return image
    colours = image.convert("RGBA")
    if colours.getchannel("A").getextrema()[0] == 255:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, background), colours).convert("RGB")


def _check_size(size: tuple[int, int], min_side: int) -> None:
    text = f"{size[0]} x {size[1]} pixels"
    if min(size) < min_side:
        raise BadImage("too small", text)
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImage("decompression bomb", text)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BadImage("too narrow", text)


def _deep_colour(content: bytes) -> str:
    """Whether a PNG has 16 bits per colour (byte 24 of its header); Pillow reads the upper 8 of them."""
    return "16-bit" if content.startswith(b"\x89PNG") and content[24:25] == b"\x10" else ""


def _shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize the short side to `side` pixels: halved by a box filter while at least twice as long, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Centre crop of ADM (arXiv 2105.05233) and DiT, size x size pixels.

    The image is halved by a box filter while its short side is at least twice the size, then resized bicubically.
    """
    image = _shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, draws: Sequence[float] | np.ndarray) -> Image.Image:
    """Random crop of ADM, size x size pixels that show 80 to 100 % of the short side.

    Args:
        image: of any size.
        size: side of the crop in pixels.
        draws: three uniform numbers in [0, 1), for the scale and for the crop's top and left.
    """
    side = size + int(draws[0] * (math.ceil(size / MIN_CROP_SHARE) - size + 1))
    image = _shrink(image, side)
    top, left = int(draws[1] * (image.height - size + 1)), int(draws[2] * (image.width - size + 1))
    return image.crop((left, top, left + size, top + size))


class Images:
    """The images of a source, cropped to squares of one size.

    A file that cannot be decoded is replaced by the next good one in the source's order, and counted.

    Args:
        source: of the files.
        image_size: side of the squares in pixels.
        channels: 1 for grey, 3 for RGB.
        crop: "centre", or "random", which needs three random numbers for each image.
        excluded: files known to be bad, by name (see lamamba.data.manifest); they have no index.
        newly_excluded: files found to be bad after a run began: they keep their index, so that the run's order stays,
            are replaced, and are not counted.
        max_bad_images: how many bad files may be replaced; one more is an error.
        bad_files: a file shared by all processes, to which each appends the bad files that it reads, so that they are
            counted together and after a restart. Without it, each process counts its own.
        caches: keep decoded images in memory where all of them fit into CACHE_BYTES.

    Raises:
        ValueError: when every file is excluded.
    """

    def __init__(
        self, source: Source, image_size: int, channels: int = 3, *, crop: Crop = "centre",
        excluded: Collection[str] = (), newly_excluded: Collection[str] = (), max_bad_images: int = 0,
        bad_files: Path | None = None, caches: bool = True,
    ):
        self.name, self.label_names = source.name, source.label_names
        self.image_size, self.channels, self.crop = image_size, channels, crop
        self.max_bad_images = max_bad_images
        self._source, self._excluded, self._newly_excluded = source, frozenset(excluded), frozenset(newly_excluded)
        self._kept = np.arange(len(source))
        if excluded:
            kept = [k for k in range(len(source)) if source.file(k) not in self._excluded]
            self._kept = np.array(kept, dtype=np.int64)
            if not len(self._kept):
                raise ValueError(f"{self.name} has no good image: all {len(source)} are excluded by its manifest")
        self.labels = source.labels[self._kept]
        """(n,) int64."""
        self.bad: dict[str, str] = {}
        """Bad files replaced so far (by all processes, where they share `bad_files`), and what is wrong with them."""
        self._bad_indices: set[int] = set()
        self._bad_files = bad_files
        self._cache: dict[int, np.ndarray] | None = None
        if caches and crop == "centre" and len(self._kept) * channels * image_size**2 <= CACHE_BYTES:
            self._cache = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_owner = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files' names, classes and order, and of which are excluded."""
        return fingerprint(self._source, self._excluded)

    @property
    def excluded(self) -> tuple[str, ...]:
        """Names of the files without an index."""
        return tuple(sorted(self._excluded))

    @property
    def source_files(self) -> tuple[str, ...]:
        """Names of all files below a folder, excluded ones among them; none of tars and data sets."""
        source = self._source
        return tuple(map(source.file, range(len(source)))) if isinstance(source, FolderSource) else ()

    def files(self, indices: Sequence[int]) -> list[str]:
        """Names of the images' files."""
        return [self._source.file(int(self._kept[index])) for index in indices]

    def read(self, indices: Sequence[int], crops: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, channels, image_size, image_size) uint8 and labels (b,) int64; a replacement has its own label.

        Args:
            indices: (b,), 0 .. len - 1.
            crops: (b, 3) uniform in [0, 1), for random crops.

        Raises:
            ValueError: naming the files, when more than max_bad_images cannot be decoded.
        """
        if self.crop == "random" and crops is None:
            raise ValueError("crop='random' needs three random numbers for every image; give them as crops")
        rows = [(index, None if crops is None else crops[row]) for row, index in enumerate(indices)]
        read = [self._read(rows[0])] if len(rows) == 1 else list(self._threads().map(self._read, rows))
        return np.stack([pixels for pixels, _ in read]), self.labels[[index for _, index in read]]

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool_owner != os.getpid():               # threads do not survive a fork
            self._pool, self._pool_owner = ThreadPoolExecutor(max_workers=DECODERS), os.getpid()
        return self._pool

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_pool": None, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _read(self, row: tuple[int, np.ndarray | None]) -> tuple[np.ndarray, int]:
        """The pixels of an image, or of the next good one, and its index."""
        first, draws = row
        for offset in range(len(self)):
            index = (int(first) + offset) % len(self)
            if index in self._bad_indices:
                continue
            try:
                return self.pixels(index, draws), index
            except BadImage as error:
                self._replace(index, error)
        raise ValueError(f"{self.name} has no good image left")

    def pixels(self, index: int, draws: np.ndarray | None = None) -> np.ndarray:
        """One image, (channels, image_size, image_size) uint8.

        Raises:
            BadImage: when its file is gone or cannot be decoded.
        """
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image, _ = read_image(self._source, int(self._kept[index]), self.channels)
        if self.crop == "random" and draws is not None:
            square = random_crop(image, self.image_size, draws)
        else:
            square = centre_crop(image, self.image_size)
        pixels = np.asarray(square, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)
        pixels = pixels.transpose(2, 0, 1)
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def _replace(self, index: int, error: BadImage) -> None:
        """Count a bad image, which is skipped from here on."""
        with self._lock:
            file = self.files([index])[0]
            if index not in self._bad_indices:
                self._bad_indices.add(index)
                if file in self._newly_excluded:
                    return
                self._share(file, str(error))
                if len(self.bad) <= self.max_bad_images:
                    logger.warning("%s cannot be read as an image (%s); the next good one replaces it", file, error)
            if len(self.bad) > self.max_bad_images:
                raise ValueError(explain_bad(self.name, self.bad, self.max_bad_images)) from error

    def _share(self, file: str, fault: str) -> None:
        """Add a bad file to the list that processes share, and theirs to `bad`."""
        self.bad[file] = fault
        if self._bad_files is None:
            return
        try:
            known = {
                name: found for name, found in read_bad_files(self._bad_files).items()
                if name not in self._newly_excluded
            }
            if file not in known:
                with self._bad_files.open("a", encoding="utf-8") as shared:     # one short write: lines stay whole
                    shared.write(f"{file}\t{printable(fault)}\n")
        except OSError as error:                                                # a full disk: training can go on
            logger.warning("%s cannot be written: %s", self._bad_files, error)
            return
        self.bad = {**known, file: fault}


def read_bad_files(path: Path) -> dict[str, str]:
    """Names and faults from a list of bad files; none where there is no list."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def explain_bad(name: str, bad: dict[str, str], allowed: int) -> str:
    """The message of an error: the first bad files of a source, their faults, and what to do."""
    named = ", ".join(f"{file} ({fault})" for file, fault in sorted(bad.items())[:NAMED])
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    verb = "file cannot be read as an image" if len(bad) == 1 else "files cannot be read as images"
    return (
        f"{len(bad)} {verb} in {name}, where {allowed} are allowed: {named}{more}. `lamamba data check {name}` finds "
        "all of them at once and writes a manifest by which training excludes them"
    )
