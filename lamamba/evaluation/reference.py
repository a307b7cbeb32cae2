"""Reference statistics: ADM's files, pytorch-fid's, and our own, which also hold features of single images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamamba._version import __version__
from lamamba.evaluation.images import Images, NpzImages, npz_array, npz_entries
from lamamba.metrics.features import FeatureNetworkInfo
from lamamba.metrics.statistics import check_features
from lamamba.options.base import from_dict, record
from lamamba.utils.files import parse_json, replacing

VERSION = 1
"""Of the statistics files that `Reference.save` writes."""
PROTOCOL = "protocol"
INCEPTION = "inception-2015-12-05"
Moments = tuple[np.ndarray, np.ndarray]
"""Mean (d,) and covariance (d, d)."""


@record
class _Protocol:
    """What a statistics file of ours says of itself."""

    version: int
    lamamba: str = ""
    name: str | None = None
    fingerprint: str | None = None
    count: int | None = None
    image_shape: tuple[int, ...] | None = None
    network: FeatureNetworkInfo | None = None


@dataclass(frozen=True)
class Reference:
    """Statistics of reference images, and features of some of them for precision, recall, density, coverage and KID."""

    name: str
    fingerprint: str
    """Hash of its contents."""
    features: Moments
    spatial: Moments | None
    """For sFID."""
    rows: np.ndarray | None
    """Features of single images, (n, d) float32."""
    count: int | None
    """Images behind the statistics, where that is known."""
    image_shape: tuple[int, ...] | None
    """Height, width, channels, where known."""
    network: FeatureNetworkInfo | None
    """Which network computed the features; None for files that do not say (ADM's, pytorch-fid's)."""

    def check(self, network: FeatureNetworkInfo, image_shape: tuple[int, ...]) -> None:
        """Check that samples fit this reference.

        Args:
            network: that computes the samples' features.
            image_shape: of a sample: height, width, channels.

        Raises:
            ValueError: for another feature network, other weights of it, or images of another size.
        """
        if self.network is None and network.name != INCEPTION:
            raise ValueError(
                f"{self.name} does not say which network made it, so it can only be Inception's; {network.name} needs "
                "a reference of its own: images, or what lamamba evaluate stats makes of them"
            )
        if self.network is not None and self.network != network:
            what = {k: (v, getattr(network, k)) for k, v in vars(self.network).items() if v != getattr(network, k)}
            said = ", ".join(f"{k} {str(a)[:24]!r} against {str(b)[:24]!r}" for k, (a, b) in what.items())
            raise ValueError(f"{self.name} was made by another feature network ({said}); make it again with this one")
        if self.image_shape is not None and tuple(self.image_shape[:2]) != tuple(image_shape[:2]):
            sizes = [f"{shape[0]} x {shape[1]}" for shape in (self.image_shape, image_shape)]
            raise ValueError(
                f"{self.name} is of {sizes[0]} images and the samples are {sizes[1]}; another size is another data set"
            )

    def save(self, path: str | Path) -> None:
        """Write an npz file with ADM's names (mu, sigma, mu_s, sigma_s); nothing in it is pickled."""
        metadata = {
            "version": VERSION, "lamamba": __version__, "name": self.name, "fingerprint": self.fingerprint,
            "count": self.count, "image_shape": self.image_shape,
            "network": dataclasses.asdict(self.network) if self.network else None,
        }
        arrays: dict[str, np.ndarray] = {"mu": self.features[0], "sigma": self.features[1]}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial[0], "sigma_s": self.spatial[1]}
        if self.rows is not None:
            arrays["features"] = self.rows
        arrays[PROTOCOL] = np.array(json.dumps(metadata))
        save: Any = np.savez                                                    # its types forbid dictionaries
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            save(file, **arrays)


def is_statistics(path: str | np.ndarray) -> bool:
    """Whether a reference is an npz file that holds statistics (and not images alone).

    Raises:
        FileNotFoundError, ValueError: as `npz_entries`.
    """
    return isinstance(path, str) and path.endswith(".npz") and {"mu", "sigma"} <= npz_entries(path).keys()


def load_statistics(path: str | Path) -> Reference:
    """A reference from ADM's npz, pytorch-fid's, or one saved by `Reference.save`.

    ADM's also holds images, under arr_0: see `reference_images`.

    Raises:
        FileNotFoundError, ValueError: when it is missing, damaged, pickled, or of a newer format.
    """
    entries = npz_entries(path)
    saved = _Protocol(version=VERSION)
    if PROTOCOL in entries:
        try:
            saved = from_dict(_Protocol, parse_json(str(npz_array(path, PROTOCOL))))
        except ValueError as error:
            raise ValueError(f"{path}: {PROTOCOL}: {error}") from error
        if not 1 <= saved.version <= VERSION:
            raise ValueError(f"{path} has format version {saved.version}, this lamamba reads up to {VERSION}")
    features = _moments(path, entries, "mu", "sigma")
    spatial = _moments(path, entries, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= entries.keys() else None
    rows = check_features(npz_array(path, "features"), f"{path}: features") if "features" in entries else None
    if rows is not None and rows.shape[1] != len(features[0]):
        raise ValueError(f"{path}: features have {rows.shape[1]} columns and mu {len(features[0])} numbers")
    shape = saved.image_shape or (entries["arr_0"][0][1:] if "arr_0" in entries else None)
    return Reference(
        name=saved.name or str(path), fingerprint=saved.fingerprint or _hash(features), features=features,
        spatial=spatial, rows=rows, count=saved.count, image_shape=shape or None, network=saved.network,
    )


def reference_images(path: str | Path) -> Images | None:
    """The images in a statistics file; None where there are none."""
    return NpzImages(path) if "arr_0" in npz_entries(path) else None


def _moments(path: str | Path, entries: dict[str, Any], mean: str, covariance: str) -> Moments:
    for name in (mean, covariance):
        if name not in entries:
            raise ValueError(f"{path} has no {name!r}; a reference holds mu and sigma (or images under arr_0)")
        if not np.issubdtype(entries[name][1], np.floating):
            raise ValueError(f"{path}: {name} holds {entries[name][1]}, and statistics are real numbers (float64)")
    (rows, *more), shape = entries[mean][0] or (0,), entries[covariance][0]
    if more or not rows or shape != (rows, rows):
        raise ValueError(f"{path}: {mean} {entries[mean][0]} and {covariance} {shape} are no mean and covariance")
    mu, sigma = (np.ascontiguousarray(npz_array(path, name), dtype=np.float64) for name in (mean, covariance))
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: {mean} or {covariance} is not finite; make or fetch it again")
    return mu, sigma


def _hash(moments: Moments) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in moments)).hexdigest()
