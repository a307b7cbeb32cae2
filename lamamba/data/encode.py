"""Images to latents on disk, once: by one process or by many that never write the same file.

The work is cut into shards, which processes claim (lamamba/utils/shards.py), write under names of their own, and rename
when they are whole. Running the command again goes on. What a shard holds is decided by the plan alone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    check_shard,
    shard_name,
)
from lamamba.data.sets import read_ahead
from lamamba.data.sources import Source, fingerprint
from lamamba.utils.files import read_json, settle, sha256, temporary_name, write_atomically
from lamamba.utils.shards import PLAN, PlannedFolder

logger = logging.getLogger("lamamba.data")

READERS = min(8, os.cpu_count() or 1)
"""Threads that decode images while the autoencoder works."""


@dataclass(frozen=True)
class Progress:
    """What encoding tells while it goes on."""

    images: int
    """Of the finished shards, whoever made them, and of this process's current one."""
    total: int
    shards: int
    """Finished."""
    num_shards: int
    phase: str
    """"encoding", "waiting" (for other processes), or "verifying"."""


def make_plan(
    source: Source, autoencoder: Autoencoder, image_size: int, *, left_out: tuple[str, ...] = (), mirror: bool = True,
    storage: str = "float16", batch_size: int = 16, threads: int = 1, shard_size: int = 1024,
) -> Plan:
    """What encoding a source will give.

    Raises:
        ValueError: when sizes or the storage type do not fit.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage={storage!r} is unknown; use {' or '.join(STORAGE)}")
    for name, number in {
        "batch_size": batch_size, "threads": threads, "shard_size": shard_size, "image_size": image_size,
    }.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    known = set(left_out)
    images = sum(source.file(k) not in known for k in range(len(source))) if known else len(source)
    if not images:
        raise ValueError(f"{source.name} has no good image: its manifest leaves all {len(source)} out")
    return Plan(
        source=source.name, source_fingerprint=fingerprint(source, left_out), images=images, image_size=image_size,
        crop="centre", views=2 if mirror else 1, parts=2 if autoencoder.has_posterior else 1,
        shape=autoencoder.latent_shape(image_size), storage=storage, facts=CodecConfig.of(autoencoder),
        compute=str(autoencoder.dtype).removeprefix("torch."), batch_size=batch_size,
        threads=threads if autoencoder.device.type == "cpu" else 0, shard_size=shard_size,
        label_names=source.label_names, left_out=tuple(left_out),
    )


def begun_without(folder: str | Path) -> tuple[str, ...] | None:
    """The files that a folder's latents leave out since they were begun; None for a new folder, or an old one.

    Raises:
        ValueError: when its plan or index is damaged.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return Index.load(folder).plan.left_out
    path = folder / UNFINISHED / PLAN
    return Plan.from_dict(read_json(path, LATENTS_VERSION)["plan"]).left_out if path.is_file() else None


def encode(
    source: Source, autoencoder: Autoencoder, folder: str | Path, plan: Plan, *, left_out: tuple[str, ...] = (),
    foreseen: Collection[str] = (), max_bad_images: int = 0, rank: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Index:
    """Encode what is not encoded yet, together with any other processes that do the same; return when all is there.

    Args:
        source: the images.
        autoencoder: frozen, on the device where it shall work.
        folder: where the latents go; new, or with what an earlier call or another process has made by the same plan.
        plan: from `make_plan` with the same source and autoencoder.
        left_out: files known to be bad when this was begun (see `begun_without`).
        foreseen: files found to be bad since then: left out of their shards, and not counted.
        max_bad_images: unforeseen ones to bear; they are left out, too.
        rank: this process's number among those that start together, so that they begin at different shards.
        on_progress: told after every batch.

    Raises:
        FileExistsError: when the folder holds something else.
        ValueError: when it holds latents of another plan, with the differences; when too many images are bad, with
            their names; when a shard is damaged.
    """
    folder = Path(folder)
    tell = on_progress or (lambda progress: None)
    job = _Job(source, autoencoder, folder, plan, left_out, foreseen, max_bad_images, rank, tell)
    if not job.is_finished():
        job.shared.begin()
        with _threads(plan.threads):
            job.encode_all()
        job.finish()
    return Index.load(folder)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many of PyTorch's threads for a while; 0: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Job:
    """One process's part in encoding."""

    def __init__(
        self, source: Source, autoencoder: Autoencoder, folder: Path, plan: Plan, left_out: tuple[str, ...],
        foreseen: Collection[str], max_bad_images: int, rank: int, tell: Callable[[Progress], None],
    ):
        self._images = Images(source, plan.image_size, autoencoder.in_channels, left_out=left_out, caches=False)
        self._autoencoder, self._folder, self._plan = autoencoder, folder, plan
        self._foreseen, self._max_bad, self._tell = frozenset(foreseen), max_bad_images, tell
        self.shared = PlannedFolder(
            folder, UNFINISHED, plan, Plan.from_dict, version=LATENTS_VERSION, what="latents", own="shard_",
            is_over=self._is_indexed,
        )
        self._work, self._claims = self.shared.work, self.shared.claims
        start = rank % plan.num_shards
        self._order = [*range(start, plan.num_shards), *range(start)]
        self._done: dict[int, Shard] = {}

    def is_finished(self) -> bool:
        """Whether all is there already, whole, and by the same plan. Where a shard is damaged, the others are kept."""
        if not self._is_indexed():
            return False
        index = Index.load(self._folder)
        self.shared.check_same(index.plan)
        whole, faults = dict[int, Shard](), []
        for number, shard in enumerate(index.shards):
            try:
                check_shard(self._folder, index.plan, shard)
                whole[number] = shard
            except ValueError as error:
                faults.append(str(error))
            self._tell(Progress(index.plan.images, index.plan.images, number + 1, index.plan.num_shards, "verifying"))
        if not faults:
            return True
        logger.warning("%d of %d shards are made anew: %s", len(faults), len(index.shards), "; ".join(faults))
        self._work.mkdir(exist_ok=True)
        with self._claims.claim("index", waits=True):
            if self._is_indexed():
                self.shared.write_plan()
                for number, shard in whole.items():
                    self._write_note(number, shard)
                (self._folder / INDEX).unlink()
        return False

    def _note(self, number: int) -> Path:
        return self._work / f"shard_{number:05d}.json"

    def _write_note(self, number: int, shard: Shard) -> None:
        write_atomically(self._note(number), json.dumps({"version": LATENTS_VERSION, **vars(shard)}) + "\n")

    def encode_all(self) -> None:
        """Take shard after shard that nobody has made or is making; then wait for the others, in case one dies."""
        self._claims.make_all(
            self._order, lambda number: f"shard_{number:05d}", self._find, self._make,
            lambda: self._report(0, "waiting"),
        )

    def _is_indexed(self) -> bool:
        return (self._folder / INDEX).is_file()

    def _find(self, number: int) -> bool:
        """Whether a shard is finished: its note is there, and the file has the size that the note says."""
        if number in self._done:
            return True
        file = self._folder / shard_name(number)
        try:
            values = read_json(self._note(number), LATENTS_VERSION)
            shard = Shard.from_dict({key: value for key, value in values.items() if key != "version"})
        except (ValueError, TypeError):
            return False
        if not file.is_file() or file.stat().st_size != shard.bytes:
            return False
        self._done[number] = shard
        self._report(0, "encoding")
        return True

    def _make(self, number: int) -> None:
        """Encode one shard and put it in its place."""
        plan, indices = self._plan, self._plan.shard_range(number)
        starts = range(indices.start, indices.stop, plan.batch_size)
        batches = [range(start, min(start + plan.batch_size, indices.stop)) for start in starts]
        moments = torch.zeros((len(indices), plan.views, plan.parts, *plan.shape), dtype=STORAGE[plan.storage])
        kept, left_out, done = [], dict[str, str](), 0
        reader = read_ahead(self._decode, batches, threads=READERS)
        for batch, (pictures, faults) in zip(batches, reader, strict=True):
            left_out |= faults
            self._count_bad(left_out)
            moments[batch.start - indices.start : batch.stop - indices.start] = self._moments(pictures, batch)
            kept += [index for index in batch if self._images.files([index])[0] not in faults]
            done += len(batch)
            self._report(done, "encoding")
        rows = [index - indices.start for index in kept]
        self._write(number, moments if len(rows) == len(indices) else moments[rows], kept, left_out)

    def _decode(self, batch: range) -> tuple[np.ndarray, dict[str, str]]:
        """Images of a batch (b, channels, size, size) uint8, black where they cannot be decoded, and what is wrong."""
        pictures, faults = [], {}
        for index in batch:
            try:
                pictures.append(self._images.pixels(index))
            except BadImage as error:
                faults[self._images.files([index])[0]] = str(error)
                pictures.append(np.zeros((self._images.channels, *2 * (self._plan.image_size,)), dtype=np.uint8))
        return np.stack(pictures), faults

    def _moments(self, pictures: np.ndarray, batch: range) -> Tensor:
        """(b, views, parts, c, h, w) as stored. A short batch is filled up, so that all shapes are alike."""
        plan, missing = self._plan, self._plan.batch_size - len(batch)
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

    def _count_bad(self, current: dict[str, str]) -> None:
        bad = {file: fault for shard in self._done.values() for file, fault in shard.left_out.items()} | current
        bad = {file: fault for file, fault in bad.items() if file not in self._foreseen}
        if len(bad) > self._max_bad:
            raise ValueError(explain_bad(self._plan.source, bad, self._max_bad))

    def _write(self, number: int, moments: Tensor, kept: list[int], left_out: dict[str, str]) -> None:
        """The shard first, then the note that it is whole."""
        path = self._folder / shard_name(number)
        temporary = temporary_name(path)
        try:
            metadata = {"format": "lamamba latents"}                            # one entry: several have no fixed order
            temporary.write_bytes(save({MOMENTS: moments.contiguous()}, metadata=metadata))
            shard = Shard(
                file=path.name, bytes=temporary.stat().st_size, sha256=sha256(temporary),
                labels=tuple(self._images.labels[kept].tolist()), files=tuple(self._images.files(kept)),
                left_out=left_out,
            )
            settle(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._write_note(number, shard)
        for file, fault in left_out.items():
            logger.warning("%s is left out: %s", file, fault)
        self._done[number] = shard

    def finish(self) -> None:
        """Verify all shards and write the index: one process does it, the others wait for it."""
        with self._claims.claim("index", waits=True):
            if self._is_indexed():
                return
            index = Index(self._plan, tuple(self._done[number] for number in range(self._plan.num_shards)))
            if not any(shard.labels for shard in index.shards):
                raise ValueError(f"no image of {self._plan.source} could be decoded")
            for done, shard in enumerate(index.shards, 1):
                try:
                    check_shard(self._folder, self._plan, shard)
                except ValueError:
                    self._note(done - 1).unlink(missing_ok=True)                # the next call makes it anew
                    raise
                self._tell(Progress(self._plan.images, self._plan.images, done, self._plan.num_shards, "verifying"))
            index.save(self._folder)
            for path in self._folder.glob(".shard_*.tmp"):                      # of killed processes
                path.unlink(missing_ok=True)
        shutil.rmtree(self._work, ignore_errors=True)

    def _report(self, in_hand: int, phase: str) -> None:
        plan = self._plan
        finished = sum(len(plan.shard_range(number)) for number in self._done)
        self._tell(Progress(finished + in_hand, plan.images, len(self._done), plan.num_shards, phase))
