"""Images to latents on disk, once, by one process or by many (lamamba/utils/shards.py).

What a shard holds is decided by the plan alone, whichever process makes it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig, to_pixels
from lamamba.data.images import BadImage, Images, explain_bad
from lamamba.data.latents import (
    INDEX,
    LATENTS_VERSION,
    MOMENTS,
    STORAGE,
    UNFINISHED,
    Index,
    Plan,
    Shard,
    check_place,
    shard_name,
)
from lamamba.data.sets import read_ahead
from lamamba.data.sources import Source, fingerprint
from lamamba.utils.files import read_json
from lamamba.utils.progress import Report
from lamamba.utils.repeatable import repeatable
from lamamba.utils.shards import PLAN, Note, ShardedJob

logger = logging.getLogger("lamamba.data")

READERS = min(8, os.cpu_count() or 1)
"""Threads that decode images while the autoencoder works."""


def make_plan(
    source: Source, autoencoder: Autoencoder, image_size: int, *, excluded: tuple[str, ...] = (), mirror: bool = True,
    storage: Literal["float16", "float32"] = "float16", batch_size: int = 16, threads: int = 1, shard_size: int = 1024,
) -> Plan:
    """The plan of encoding a source.

    Raises:
        ValueError: when all images are excluded, or their size does not fit the autoencoder.
    """
    known = set(excluded)
    images = sum(source.file(k) not in known for k in range(len(source))) if known else len(source)
    if not images:
        raise ValueError(f"{source.name} has no good image: its manifest excludes all {len(source)}")
    return Plan(
        source=source.name, source_fingerprint=fingerprint(source, excluded), images=images, image_size=image_size,
        crop="centre", views=2 if mirror else 1, parts=2 if autoencoder.has_posterior else 1,
        shape=autoencoder.latent_shape(image_size), storage=storage, codec=CodecConfig.of(autoencoder),
        compute=str(autoencoder.dtype).removeprefix("torch."), batch_size=batch_size,
        threads=threads if autoencoder.device.type == "cpu" else 0, shard_size=shard_size,
        label_names=source.label_names, excluded=tuple(excluded),
    )


def excluded_at_start(folder: str | Path) -> tuple[str, ...] | None:
    """The files that were known to be bad when a folder's encoding began; None for a new folder, or an old one.

    Raises:
        ValueError: when its plan or index is damaged.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return Index.load(folder).plan.excluded
    path = folder / UNFINISHED / PLAN
    return Plan.from_dict(read_json(path, LATENTS_VERSION).get("plan"), path).excluded if path.is_file() else None


def encode(
    source: Source, autoencoder: Autoencoder, folder: str | Path, plan: Plan, *, newly_excluded: Collection[str] = (),
    max_bad_images: int = 0, rank: int = 0, report: Report | None = None,
) -> Index:
    """Encode what is not encoded yet, together with any other processes that do the same.

    Args:
        source: the images.
        autoencoder: frozen, on the device where it shall work.
        folder: for the latents; new, or with what an earlier call or another process has made by the same plan.
        plan: from `make_plan` with the same source and autoencoder.
        newly_excluded: files found to be bad since this was begun: missing from their shards, and not counted below.
        max_bad_images: how many other files may turn out to be bad; they are missing from their shards, too.
        rank: of this process among those that start together, so that they begin at different shards.
        report: called with the progress of "encoding" and "verifying".

    Returns:
        The index, when all shards are there and verified.

    Raises:
        FileExistsError: when the folder holds something else.
        ValueError: when it holds latents of another plan, with the differences; when too many images are bad, with
            their names.
        OSError: when the disk is full or broken; finished shards stay.
    """
    images = Images(source, plan.image_size, autoencoder.in_channels, excluded=plan.excluded or (), caches=False)
    job = _EncodingJob(
        Path(folder), plan, images, autoencoder, frozenset(newly_excluded), max_bad_images, rank=rank, report=report
    )
    with repeatable(plan.threads):
        job.run()
    return Index.load(Path(folder))


class _EncodingJob(ShardedJob[Plan]):
    version, unfinished, result = LATENTS_VERSION, UNFINISHED, INDEX
    task, what, own = "encoding", "latents", ("shard_",)

    def __init__(
        self, folder: Path, plan: Plan, images: Images, autoencoder: Autoencoder, newly_excluded: frozenset[str],
        max_bad_images: int, *, rank: int, report: Report | None,
    ):
        super().__init__(folder, plan, rank=rank, report=report)
        self._images, self._autoencoder = images, autoencoder
        self._newly_excluded, self._max_bad = newly_excluded, max_bad_images

    def make_shard(self, number: int, advance: Callable[[float], None]) -> tuple[dict[str, bytes], Note]:
        plan, indices = self.plan, self.plan.shard_range(number)
        starts = range(indices.start, indices.stop, plan.batch_size)
        batches = [range(start, min(start + plan.batch_size, indices.stop)) for start in starts]
        moments = torch.zeros((len(indices), plan.views, plan.parts, *plan.shape), dtype=STORAGE[plan.storage])
        kept, bad = [], dict[str, str]()
        for batch, (pictures, faults) in zip(batches, read_ahead(self._decode, batches, threads=READERS), strict=True):
            bad |= faults
            self._check_bad(bad)
            moments[batch.start - indices.start : batch.stop - indices.start] = self._moments(pictures, batch)
            kept += [index for index in batch if self._images.files([index])[0] not in faults]
            advance(batch.stop - indices.start)
        for file, fault in bad.items():
            logger.warning("%s is excluded: %s", file, fault)
        if bad:
            moments = moments[[index - indices.start for index in kept]]
        metadata = {"format": "lamamba latents"}                                # one entry: several have no fixed order
        return {shard_name(number): save({MOMENTS: moments.contiguous()}, metadata=metadata)}, {
            "labels": self._images.labels[kept].tolist(), "files": self._images.files(kept), "left_out": bad,
        }

    def make_note(self, files: dict[str, list[Any]], more: Note) -> Note:
        (name, (size, digest)), = files.items()
        return {"version": self.version, "file": name, "bytes": size, "sha256": digest, **more}

    def check_note(self, number: int, note: Note) -> None:
        shard = Shard.from_dict({key: note[key] for key in note if key != "version"})
        check_place(shard, self.plan, number)

    def files_of(self, note: Note) -> dict[str, list[Any]]:
        return {note["file"]: [note["bytes"], note["sha256"]]}

    def _decode(self, batch: range) -> tuple[np.ndarray, dict[str, str]]:
        """Images of a batch (b, channels, size, size) uint8, black where they cannot be decoded, and what is wrong."""
        pictures, faults = [], {}
        for index in batch:
            try:
                pictures.append(self._images.pixels(index))
            except BadImage as error:
                faults[self._images.files([index])[0]] = str(error)
                pictures.append(np.zeros((self._images.channels, *2 * (self.plan.image_size,)), dtype=np.uint8))
        return np.stack(pictures), faults

    def _moments(self, pictures: np.ndarray, batch: range) -> Tensor:
        """(b, views, parts, c, h, w) as stored. A short batch is filled up, so that all shapes are alike."""
        plan, missing = self.plan, self.plan.batch_size - len(batch)
        if missing:
            pictures = np.concatenate([pictures, np.repeat(pictures[-1:], missing, axis=0)])
        views = []
        for view in range(plan.views):
            mean, std = self._autoencoder.moments(to_pixels(pictures, np.full(plan.batch_size, bool(view))))
            views.append(torch.stack([mean] if std is None else [mean, std], dim=1))
        exact = torch.stack(views, dim=1)[: len(batch)].cpu()
        stored = exact.to(STORAGE[plan.storage])
        if not stored.isfinite().all():
            row = int((~stored.isfinite()).flatten(1).any(1).nonzero()[0])
            file, largest = self._images.files([batch[row]])[0], float(exact[row].abs().max())
            advice = "store float32" if exact.isfinite().all() else "compute in float32; are the weights right?"
            raise ValueError(f"the latents of {file} are too large for {plan.storage} (up to {largest:g}): {advice}")
        return stored

    def _check_bad(self, current: dict[str, str]) -> None:
        bad = {file: fault for note in self.notes.values() for file, fault in note["left_out"].items()} | current
        bad = {file: fault for file, fault in bad.items() if file not in self._newly_excluded}
        if len(bad) > self._max_bad:
            raise ValueError(explain_bad(self.plan.source, bad, self._max_bad))

    def finish(self, notes: list[Note]) -> str:
        shards = [Shard.from_dict({key: note[key] for key in note if key != "version"}) for note in notes]
        index = Index(self.plan, tuple(shards))
        if not any(shard.labels for shard in index.shards):
            raise ValueError(f"no image of {self.plan.source} could be decoded")
        return json.dumps(index.to_dict()) + "\n"

    def read_result(self) -> tuple[Plan, Mapping[int, Note], Mapping[str, list[Any]]]:
        index = Index.load(self.folder)
        notes = ({"version": self.version, **shard.to_dict()} for shard in index.shards)
        return index.plan, dict(enumerate(notes)), {}
