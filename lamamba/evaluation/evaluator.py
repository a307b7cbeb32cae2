"""Evaluation by any number of processes: all of them compute features, rank 0 the figures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamamba.evaluation.candidates import SampleSet, open_images
from lamamba.evaluation.extraction import Features, extract, spread
from lamamba.evaluation.figures import Figures, compute_figures, mean_and_spread, moments
from lamamba.evaluation.images import Images, digest, fit_channels
from lamamba.evaluation.reference import Reference, is_statistics, load_statistics, reference_images
from lamamba.evaluation.results import Entry
from lamamba.metrics.features import FeatureNetwork
from lamamba.metrics.statistics import Statistics
from lamamba.options.base import from_dict
from lamamba.options.evaluation import EvaluateOptions, StatisticsOptions
from lamamba.options.metrics import MetricOptions
from lamamba.utils.distributed import ProcessGroup
from lamamba.utils.files import write_atomically
from lamamba.utils.locks import FolderLock, LocksUnsupported
from lamamba.utils.progress import Progress, Report

logger = logging.getLogger("lamamba.evaluation")


@dataclass(frozen=True)
class Evaluator:
    """A feature network, the folder of cached features, and the processes that share both."""

    network: FeatureNetwork
    options: EvaluateOptions | StatisticsOptions
    group: ProcessGroup
    report: Report

    @property
    def folder(self) -> Path:
        """Of cached features and finished entries: where a call was stopped, the next one goes on from them."""
        return self.options.out.with_suffix(".work")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder for this call alone, where the file system has locks; an empty one is removed at the end.

        Raises:
            BlockingIOError: when another job works there.
        """
        lock = FolderLock(self.folder, "evaluates")

        def acquire() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(LocksUnsupported):
                lock.acquire()

        self.group.on_rank_0(acquire)
        try:
            yield
        finally:
            if self.group.is_rank_zero:
                with contextlib.suppress(OSError):                              # in use, on Windows
                    (self.folder / ".lock").unlink(missing_ok=True)
                lock.release()
                with contextlib.suppress(OSError):                              # not empty
                    self.folder.rmdir()

    def fit(self, images: Images) -> Images:
        """Images with the network's channels; see `fit_channels`."""
        info = self.network.info
        return fit_channels(images, info.channels, info.name, repeat_grey=self.options.grey == "repeat")

    def extract(self, images: Images, task: str) -> Features:
        """Features of images, computed by all processes; those on disk are not computed again."""
        features = extract(
            self.fit(images), self.network, self.folder, shard_size=self.options.shard_size,
            batch_size=self.options.batch_size, rank=self.group.rank, report=self.report, task=task,
        )
        self.group.wait()
        return features

    def statistics(self, features: Features) -> dict[str, Statistics]:
        """Statistics of "features", and of "spatial" where there are any: each process sums a part of the shards."""
        shards = features.shards[self.group.rank :: self.group.world_size]
        names = [name for name in ("features", "spatial") if name in features.names()]
        return {name: features.statistics(name, shards).reduce(self.group.all_reduce) for name in names}

    def make_reference(self, images: Images, name: str, num_rows: int) -> Reference:
        """A reference of images, with the features of at most `num_rows` of them."""
        images = self.fit(images)
        features = self.extract(images, "reference")
        statistics = self.statistics(features)
        return Reference(
            name=name, fingerprint=str(images.metadata["fingerprint"]), features=moments(statistics["features"]),
            spatial=moments(statistics["spatial"]) if "spatial" in statistics else None,
            rows=features.rows(limit=num_rows), count=len(images), image_shape=tuple(images.shape),
            network=self.network.info,
        )

    def open_reference(self, name: str | np.ndarray, samples: Images, num_rows: int) -> Reference:
        """The reference of samples: from a file of statistics, or computed of images.

        Files are cropped and scaled to the samples' size, as training does; those for a model's samples are converted
        to its channels, too.

        Raises:
            FileNotFoundError, ValueError: when it is missing, damaged or does not fit.
        """
        if isinstance(name, str) and is_statistics(name):
            return self._load_reference(name, self.fit(samples).shape, num_rows)
        image_shape, is_model = samples.shape, samples.metadata["kind"] == "generated"
        is_square = image_shape[0] == image_shape[1]
        images = open_images(
            name, image_shape[0] if is_square else None, channels=image_shape[2] if is_model and is_square else None
        )
        name = name if isinstance(name, str) else "array"
        if images.shape[:2] != image_shape[:2]:
            sizes = " and ".join(f"{s[0]} x {s[1]}" for s in (images.shape, image_shape))
            raise ValueError(f"{name} and the samples are {sizes} pixels; another size is another data set")
        return self.make_reference(images, name, num_rows)

    def _load_reference(self, path: str, image_shape: tuple[int, ...], num_rows: int) -> Reference:
        reference = load_statistics(path)
        reference.check(self.network.info, image_shape)
        images, rows = reference_images(path), reference.rows
        if rows is None and images is not None:                                 # ADM's: moments of all, images of some
            rows = self.extract(images, "reference").rows(limit=num_rows)
        elif rows is not None:
            rows = rows[spread(len(rows), num_rows)]
        size = len(reference.features[0])
        if reference.network is None and self.network.info.name.startswith("inception") and size != 2048:
            raise ValueError(f"{path} has {size} features, Inception's pool3 2048: another network made it")
        return dataclasses.replace(reference, rows=rows)

    def evaluate(
        self, sample_set: SampleSet, reference: Reference, options: MetricOptions, protocol: dict[str, Any],
        *, keep_features: bool,
    ) -> Entry:
        """Figures of all seed ranges, with mean and spread; the same on every rank.

        An entry that was finished by an earlier, stopped call is read.
        """
        rows = np.ascontiguousarray([] if reference.rows is None else reference.rows)          # other files, other rows
        content = hashlib.sha256(rows.tobytes()).hexdigest()
        name = digest(protocol, [dict(run.metadata) for run in sample_set.runs], content)[:16]
        path = self.folder / f"{name}.entry.json"
        finished: Entry | None = self.group.broadcast(_read_entry(path))
        if finished is not None:
            return finished
        runs, folders = [], []
        for number, images in enumerate(sample_set.runs):
            task = sample_set.name + (f", repeat {number + 1}" if len(sample_set.runs) > 1 else "")
            features = self.extract(images, task)
            statistics = self.statistics(features)
            figures = functools.partial(
                compute_figures, features, statistics, reference, options,
                has_class_logits=self.network.has_class_logits,
                on_progress=lambda task, share: self.report(Progress(task, round(100 * share), 100, "%")),
            )
            runs.append(self.group.on_rank_0(figures))
            folders.append(features.folder)

        def finish() -> Entry:
            figures: list[Figures] = [run for run in runs if run is not None]
            means, deviations = mean_and_spread(figures)
            entry = Entry(
                name=sample_set.name, step=sample_set.step, ema=sample_set.ema, guidance=sample_set.guidance,
                figures=means, spread=deviations, runs=figures, protocol=protocol,
            )
            text = json.dumps(dataclasses.asdict(entry))
            write_atomically(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")
            for folder in folders if not keep_features else []:
                shutil.rmtree(folder)
            return entry

        entry = self.group.broadcast(self.group.on_rank_0(finish))
        assert entry is not None
        return entry

    def clear(self) -> None:
        """Remove cached features and finished entries, and nothing else."""
        for path in self.folder.iterdir():
            if (path / "plan.json").is_file():
                shutil.rmtree(path)
            elif path.name.endswith(".entry.json"):
                path.unlink()


def _read_entry(path: Path) -> Entry | None:
    """The entry in a file; None where there is none, or its first line is not the SHA-256 of its second."""
    if not path.is_file():
        return None
    digest, _, text = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(text.strip()).hexdigest().encode():
        logger.warning("%s is not what was written: its figures are computed anew", path)
        return None
    return from_dict(Entry, json.loads(text), path)
