"""The field's npz of samples, np.savez(path, arr_0=images, arr_1=labels), written shard by shard."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lamamba.utils.files import replacing

FIXED_DATE = (1980, 1, 1, 0, 0, 0)
"""Of the members, as NumPy has it: the same images give the same bytes on any day."""


def write_npz(path: Path, shape: tuple[int, int, int], images: Iterable[np.ndarray], labels: Sequence[int] | None,
              count: int) -> None:
    """Write uint8 images (count, h, w, 3) as arr_0 and, where there are labels, int64 (count,) as arr_1.

    Only one shard is in memory at a time, and the file is renamed to its name when it is complete.

    Args:
        path: the file.
        shape: of one image, (h, w, 3).
        images: shards (n, h, w, 3), or (n, h, w, 1) for grey images, whose channel is repeated.
        labels: one per image; None for an unconditional model.
        count: images in all.

    Raises:
        ValueError: when the shards do not add up to count images of the shape.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", FIXED_DATE), "w", force_zip64=True) as member:
            _header(member, (count, *shape), np.dtype(np.uint8))
            written = 0
            for shard in images:
                full = np.ascontiguousarray(np.broadcast_to(shard, (len(shard), *shape)))
                if full.dtype != np.uint8:
                    raise ValueError(f"images are {full.dtype}, the file holds uint8")
                member.write(full.data)
                written += len(shard)
        if written != count:
            raise ValueError(f"{written} images came for {path.name}, which is to hold {count}")
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy", FIXED_DATE), "w", force_zip64=True) as member:
                _header(member, (count,), np.dtype(np.int64))
                member.write(np.asarray(labels, dtype="<i8").tobytes())


def _header(member: object, shape: tuple[int, ...], dtype: np.dtype) -> None:
    values = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, values)                        # type: ignore[arg-type]
