"""Features of many images, shard by shard on disk: a kill loses the shard in work, and any number of processes share.

    FOLDER/PLAN/plan.json                   which images, which network, how many in a shard; PLAN is its hash
    FOLDER/PLAN/shard_00003.safetensors     features, and what else the network makes, of its images in order

A shard is written beside its place and renamed. Another plan has a folder of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lamamba.evaluation.images import Images, digest
from lamamba.metrics.features import FeatureNetwork
from lamamba.metrics.statistics import Statistics, check_features

ASKED = "asked"
"""The classes that images should show, beside their features."""


class Features:
    """The features of a set of images, on disk; made by `extract`."""

    def __init__(self, folder: Path, count: int, shard_size: int):
        self.folder, self.count = folder, count
        self._parts = [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]

    def __len__(self) -> int:
        return self.count

    @property
    def num_shards(self) -> int:
        return len(self._parts)

    def places(self, shard: int) -> range:
        """Which images a shard holds."""
        return self._parts[shard]

    def path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.safetensors"

    def has(self, shard: int) -> bool:
        """Whether a shard is there and whole."""
        try:
            with safe_open(self.path(shard), framework="numpy") as file:
                return file.get_slice("features").get_shape()[0] == len(self._parts[shard])
        except (OSError, SafetensorError):
            return False

    def names(self) -> list[str]:
        """What the network has made."""
        with safe_open(self.path(0), framework="numpy") as file:
            return sorted(file.keys())

    def read(self, shard: int, name: str) -> np.ndarray:
        with safe_open(self.path(shard), framework="numpy") as file:
            return file.get_tensor(name)

    def whole(self, name: str = "features", limit: int | None = None) -> np.ndarray:
        """All of them in order, (count, d); or as many as `limit`, spread evenly."""
        chosen = np.arange(self.count)
        if limit is not None and limit < self.count:
            chosen = np.arange(limit) * self.count // limit
        rows = []
        for shard, places in enumerate(self._parts):
            mine = chosen[(chosen >= places.start) & (chosen < places.stop)] - places.start
            rows.append(self.read(shard, name)[mine])
        return np.concatenate(rows)

    def statistics(self, name: str = "features", shards: range | None = None) -> Statistics:
        """Of all shards, or of some."""
        statistics: Statistics | None = None
        for shard in shards if shards is not None else range(self.num_shards):
            values = self.read(shard, name)
            statistics = (statistics or Statistics(values.shape[1])).add(values)
        return statistics or Statistics(self.read(0, name).shape[1])


def extract(
    images: Images, network: FeatureNetwork, folder: str | Path, *, shard_size: int = 1000, batch_size: int = 64,
    rank: int = 0, num_processes: int = 1, on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Compute the features that are not on disk yet; this process's part of them.

    All processes call this with the same folder, and wait for each other before they read.

    Args:
        images: what to look at.
        network: what looks at them.
        folder: for the shards.
        shard_size: images in a shard: what a kill may lose.
        batch_size: images that the network sees at once.
        rank, num_processes: process r of n makes shards r, r + n, ..
        on_progress: told images done by this process, and how many of those were found on disk.

    Raises:
        ValueError: when an image cannot be read, or a feature is NaN or infinite.
    """
    if min(shard_size, batch_size) < 1:
        raise ValueError(f"shard_size={shard_size} and batch_size={batch_size} must be at least 1")
    plan = {"images": dict(images.facts), "count": len(images), "network": asdict(network.facts), "shard": shard_size,
            "shape": list(images.shape)}
    place = Path(folder) / digest(plan)[:16]
    place.mkdir(parents=True, exist_ok=True)
    (place / f".plan.{rank}").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    os.replace(place / f".plan.{rank}", place / "plan.json")
    features, done, found = Features(place, len(images), shard_size), 0, 0
    for shard in range(rank, features.num_shards, num_processes):
        places = features.places(shard)
        if features.has(shard):
            found += len(places)
            done += len(places)
        else:
            for done_here in _make_shard(images, network, features, shard, batch_size):
                if on_progress:
                    on_progress(done + done_here, found)
            done += len(places)
        if on_progress:
            on_progress(done, found)
    return features


def _make_shard(
    images: Images, network: FeatureNetwork, features: Features, shard: int, batch_size: int
) -> Iterator[int]:
    """Write one shard; yields how many of its images are done."""
    places, pieces = features.places(shard), []
    for start in range(places.start, places.stop, batch_size):
        batch = range(start, min(start + batch_size, places.stop))
        outputs = network(images.read(batch))
        for name, values in outputs.items():
            check_features(values.reshape(len(values), -1), f"{name} of images {batch.start} .. {batch.stop - 1}")
        pieces.append(outputs)
        yield batch.stop - places.start
    tensors = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    asked = images.asked(places)
    if asked is not None:
        tensors[ASKED] = asked.astype(np.int64)
    temporary = features.path(shard).with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, features.path(shard))
