"""What samples are compared with: ADM's reference files, images, or statistics saved earlier."""

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

VERSION = 1
"""Of the statistics files that `Reference.save` writes."""
PROTOCOL = "protocol"
INCEPTION = "inception-2015-12-05"
Moments = tuple[np.ndarray, np.ndarray]
"""Mean (d,) and covariance (d, d)."""


@dataclass(frozen=True)
class Reference:
    """Statistics of reference images, and features of some of them for the metrics that look at neighbours."""

    name: str
    fingerprint: str
    """Of its contents."""
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
    """What made the features; None: a file that does not say (ADM's, pytorch-fid's)."""

    def check(self, network: FeatureNetworkInfo, image_shape: tuple[int, ...]) -> None:
        """Refuse samples that this reference does not fit.

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
        """As an npz file with ADM's names (mu, sigma, mu_s, sigma_s), readable by others; nothing in it is pickled."""
        facts = {
            "version": VERSION, "lamamba": __version__, "name": self.name, "fingerprint": self.fingerprint,
            "count": self.count, "image_shape": self.image_shape,
            "network": dataclasses.asdict(self.network) if self.network else None,
        }
        arrays: dict[str, np.ndarray] = {"mu": self.features[0], "sigma": self.features[1]}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial[0], "sigma_s": self.spatial[1]}
        if self.rows is not None:
            arrays["features"] = self.rows
        arrays[PROTOCOL] = np.array(json.dumps(facts))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        save: Any = np.savez                                                    # its types forbid dictionaries
        with temporary.open("wb") as file:
            save(file, **arrays)
        temporary.replace(path)


def is_statistics(path: str | Path) -> bool:
    """Whether an npz file holds statistics (and not images alone).

    Raises:
        FileNotFoundError, ValueError: as `npz_entries`.
    """
    return {"mu", "sigma"} <= npz_entries(path).keys()


def load_statistics(path: str | Path) -> Reference:
    """A reference from ADM's npz, pytorch-fid's, or one saved by `Reference.save`.

    ADM's also has images, under arr_0: see `reference_images`.

    Raises:
        FileNotFoundError, ValueError: when it is missing, damaged, pickled, or of a newer format.
    """
    entries = npz_entries(path)
    facts: dict[str, Any] = {}
    if PROTOCOL in entries:
        facts = json.loads(str(npz_array(path, PROTOCOL)))
        if not isinstance(facts.get("version"), int) or facts["version"] > VERSION:
            raise ValueError(f"{path} has format version {facts.get('version')}, this lamamba reads up to {VERSION}")
    features = _moments(path, entries, "mu", "sigma")
    spatial = _moments(path, entries, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= entries.keys() else None
    rows = check_features(npz_array(path, "features"), f"{path}: features") if "features" in entries else None
    shape = facts.get("image_shape") or (entries["arr_0"][0][1:] if "arr_0" in entries else None)
    return Reference(
        name=str(facts.get("name") or path), fingerprint=str(facts.get("fingerprint") or _hash(features)),
        features=features, spatial=spatial, rows=rows, count=facts.get("count"),
        image_shape=tuple(shape) if shape else None,
        network=FeatureNetworkInfo(**facts["network"]) if facts.get("network") else None,
    )


def reference_images(path: str | Path) -> Images | None:
    """The images inside a statistics file, where there are some."""
    return NpzImages(path) if "arr_0" in npz_entries(path) else None


def _moments(path: str | Path, entries: dict[str, Any], mean: str, covariance: str) -> Moments:
    for name in (mean, covariance):
        if name not in entries:
            raise ValueError(f"{path} has no {name!r}; a reference holds mu and sigma (or images under arr_0)")
    mu, sigma = (npz_array(path, name).astype(np.float64) for name in (mean, covariance))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: {mean} {mu.shape} and {covariance} {sigma.shape} are no finite mean and covariance")
    return mu, sigma


def _hash(moments: Moments) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in moments)).hexdigest()
