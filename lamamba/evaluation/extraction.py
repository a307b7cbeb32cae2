"""Features of many images, shard by shard on disk, by one process or by many (lamamba/utils/shards.py).

    FOLDER/PLAN/plan.json                   which images, which network, images per shard; PLAN is its hash
    FOLDER/PLAN/shard_00003.safetensors     features, and the network's other outputs, of its images in order
    FOLDER/PLAN/shards.json                 size and hash of each shard, when all are there

Another plan has a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from lamamba.evaluation.images import Images, digest
from lamamba.metrics.features import FeatureNetwork
from lamamba.metrics.statistics import Statistics, check_features
from lamamba.utils.files import read_json, write_json
from lamamba.utils.progress import Report
from lamamba.utils.shards import PLAN, Note, PlainPlan, ShardedJob, ShardPlan

REQUESTED = "asked"
"""Name in a shard of the classes that the images were requested to show."""
FEATURES_VERSION = 1


class _Plan(PlainPlan):
    @property
    def sizes(self) -> tuple[int, int]:
        return self.values["count"], self.values["shard"]


def spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` of so many rows, evenly spaced; of all where there are no more."""
    return np.arange(count) if limit is None or limit >= count else np.arange(limit) * count // limit


class Features:
    """The features of a set of images, on disk; made by `extract`. Each shard is compared with its hash as it is read.

    Args:
        folder: of the shards.
        plan: of their numbers.
        hashes: SHA-256 of each.
    """

    def __init__(self, folder: Path, plan: ShardPlan, hashes: Sequence[str]):
        self.folder, self._plan, self._hashes = folder, plan, hashes
        self._newest: tuple[int, dict[str, np.ndarray]] | None = None

    @property
    def shards(self) -> range:
        """Their numbers."""
        return range(self._plan.num_shards)

    def path(self, shard: int) -> Path:
        return self.folder / _file_name(shard)

    def names(self) -> list[str]:
        """Names of the network's outputs."""
        return sorted(self._load(0))

    def read(self, shard: int, name: str) -> np.ndarray:
        """One output (n, ...) of a shard's images.

        Raises:
            ValueError: when the shard has changed since it was made.
        """
        return self._load(shard)[name]

    def _load(self, shard: int) -> dict[str, np.ndarray]:
        if self._newest is None or self._newest[0] != shard:
            content = self.path(shard).read_bytes()
            if hashlib.sha256(content).hexdigest() != self._hashes[shard]:
                raise ValueError(f"{self.path(shard)} is not what was written; run the same command again")
            self._newest = shard, load(content)
        return self._newest[1]

    def rows(self, name: str = "features", limit: int | None = None) -> np.ndarray:
        """All rows in order, (count, d); or as many as `limit`, spread evenly."""
        chosen, rows = spread(self._plan.sizes[0], limit), []
        for shard in self.shards:
            indices = self._plan.shard_range(shard)
            mine = chosen[(chosen >= indices.start) & (chosen < indices.stop)] - indices.start
            rows.append(self.read(shard, name)[mine])
        return np.concatenate(rows)

    def statistics(self, name: str = "features", shards: range | None = None) -> Statistics:
        """Of all shards, or of some."""
        statistics = Statistics(self.read(0, name).shape[1])
        for shard in self.shards if shards is None else shards:
            statistics.add(self.read(shard, name))
        return statistics


def extract(
    images: Images, network: FeatureNetwork, folder: str | Path, *, shard_size: int = 1000, batch_size: int = 64,
    rank: int = 0, report: Report | None = None, task: str = "features",
) -> Features:
    """Compute the features that are not on disk yet, together with any other processes that do the same.

    Args:
        images: images to read.
        network: computes the features.
        folder: for the shards.
        shard_size: images in a shard: what a kill may lose.
        batch_size: images per batch of the network.
        rank: of this process among those that start together, so that they begin at different shards.
        report: called with the progress.
        task: its name in the progress.

    Returns:
        The features, when all are there and verified by their hashes.

    Raises:
        ValueError: when an image cannot be read, or a feature is NaN or infinite.
        OSError: when the disk is full or broken; finished shards stay.
    """
    plan = _Plan({
        "images": dict(images.metadata), "count": len(images), "network": asdict(network.info), "shard": shard_size,
        "shape": list(images.shape),
    })
    place = Path(folder) / digest(plan.values)[:16]
    write_json(place / PLAN, plan.values)
    job = _ExtractionJob(place, plan, images, network, batch_size, task, rank=rank, report=report)
    job.run()
    _, notes, _ = job.read_result()
    return Features(place, plan, [job.files_of(notes[k])[_file_name(k)][1] for k in range(plan.num_shards)])


def _file_name(shard: int) -> str:
    return f"shard_{shard:05d}.safetensors"


class _ExtractionJob(ShardedJob[_Plan]):
    version, unfinished, result = FEATURES_VERSION, ".unfinished", "shards.json"
    what, own = "features", ("",)

    def __init__(
        self, folder: Path, plan: _Plan, images: Images, network: FeatureNetwork, batch_size: int, task: str, *,
        rank: int, report: Report | None,
    ):
        super().__init__(folder, plan, rank=rank, report=report)
        self._images, self._network, self._batch_size, self.task = images, network, batch_size, task

    def make_shard(self, number: int, advance: Callable[[float], None]) -> tuple[dict[str, bytes], Note]:
        indices, outputs = self.plan.shard_range(number), []
        for start in range(indices.start, indices.stop, self._batch_size):
            batch = range(start, min(start + self._batch_size, indices.stop))
            outputs.append(self._network(self._images.read(batch)))
            for name, values in outputs[-1].items():
                check_features(values.reshape(len(values), -1), f"{name} of images {batch.start} .. {batch.stop - 1}")
            advance(batch.stop - indices.start)
        tensors = {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}
        if (classes := self._images.classes(indices)) is not None:
            tensors[REQUESTED] = classes.astype(np.int64)
        return {_file_name(number): save(tensors)}, {}

    def finish(self, notes: list[Note]) -> str:
        values = {"version": FEATURES_VERSION, "plan": self.plan.to_dict(), "shards": notes}
        return json.dumps(values, indent=2) + "\n"

    def read_result(self) -> tuple[_Plan, Mapping[int, Note], Mapping[str, list[Any]]]:
        try:
            values = read_json(self.folder / self.result, FEATURES_VERSION)
            notes = {k: self.make_note(dict(note["files"]), {}) for k, note in enumerate(values["shards"])}
        except (KeyError, TypeError, ValueError):                               # damaged: all are made again
            notes = {}
        return self.plan, notes, {}                                             # the folder's name is the plan's hash
