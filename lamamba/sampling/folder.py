"""Any number of images on disk, by one process or by many; a killed one loses the shard in work.

A shard is one batch (lamamba/utils/shards.py). Image k is a function of the plan and of k, so it does not matter which
process makes it, or when.

    DIR/000000.png ...       the images, each with its settings
    DIR/samples.npz          or (and) all of them in the field's format, put together at the end
    DIR/manifest.json        the plan, machines and versions, hashes: all that is needed to repeat it
    DIR/shards.json          every file's size and hash
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lamamba.sampling.npz import write_npz
from lamamba.sampling.plan import MANIFEST, NPZ, SAMPLES_VERSION, SHARDS, UNFINISHED, Plan
from lamamba.sampling.settings import png_text
from lamamba.utils.files import read_json, sha256, write_atomically
from lamamba.utils.progress import Report
from lamamba.utils.shards import Note, ShardedJob
from lamamba.viz.grids import bare_picture

MakeImages = Callable[[range, Callable[[float], None]], np.ndarray]
"""(indices of a shard's images, a function that takes the share done) -> uint8 images (n, h, w, c)."""


def sample_many(
    plan: Plan, folder: str | Path, make_images: MakeImages, *, rank: int = 0, machine: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Make the images of a plan that are missing, together with any other processes that do the same.

    Args:
        plan: what to make.
        folder: new, or with what an earlier call or another process has made by the same plan.
        make_images: makes the images of a shard, as the plan says.
        rank: of this process among those that start together, so that they begin at different shards.
        machine: device and versions, for the manifest.
        report: called with the progress of "sampling", "verifying" and "writing samples.npz".

    Returns:
        The manifest, when all images are there and verified.

    Raises:
        FileExistsError: when the folder holds something else.
        ValueError: when it holds images of another plan, with the differences.
        OSError: when the disk is full or broken; finished shards stay.
    """
    _SamplingJob(Path(folder), plan, make_images, dict(machine or {}), rank=rank, report=report).run()
    return read_json(Path(folder) / MANIFEST, SAMPLES_VERSION)


class _SamplingJob(ShardedJob[Plan]):
    version, unfinished, result = SAMPLES_VERSION, UNFINISHED, MANIFEST
    task, what, digits = "sampling", "images", 6

    def __init__(
        self, folder: Path, plan: Plan, make_images: MakeImages, machine: dict[str, Any], *, rank: int,
        report: Report | None,
    ):
        super().__init__(folder, plan, rank=rank, report=report)
        self._make_images, self._machine = make_images, machine

    def check_note(self, number: int, note: Note) -> None:
        plan = self.plan
        names = [_array_name(number)] if plan.files == "npz" else list(map(plan.file_of, plan.shard_range(number)))
        has_texts = isinstance(note["pixels_sha256"], str) and isinstance(note["machine"], dict)
        if list(note["files"]) != names or not has_texts:
            raise ValueError(f"shard {number} has a damaged note")

    def path(self, name: str) -> Path:
        return (self.work if name.endswith(".npy") else self.folder) / name

    def make_shard(self, number: int, advance: Callable[[float], None]) -> tuple[dict[str, bytes], Note]:
        plan, indices = self.plan, self.plan.shard_range(number)
        images = self._make_images(indices, lambda share: advance(share * len(indices)))
        expected = (len(indices), *plan.shape)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"images came as {images.dtype} {images.shape}, the plan wants uint8 {expected}")
        if plan.files == "npz":
            buffer = io.BytesIO()
            np.save(buffer, images, allow_pickle=False)
            files = {_array_name(number): buffer.getvalue()}
        else:
            files = {plan.file_of(k): self._png(k, image) for k, image in zip(indices, images, strict=True)}
        return files, {"pixels_sha256": hashlib.sha256(images.tobytes()).hexdigest(), "machine": self._machine}

    def _png(self, k: int, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        bare_picture(image).save(buffer, format="PNG", pnginfo=png_text(self.plan.metadata_of(k)))
        return buffer.getvalue()

    def finish(self, notes: list[Note]) -> str:
        plan = self.plan
        manifest = {
            "version": SAMPLES_VERSION, "plan": plan.to_dict(), "files": plan.files, "images": plan.num,
            "pixels_sha256": hashlib.sha256("".join(note["pixels_sha256"] for note in notes).encode()).hexdigest(),
            "machines": _count_machines(plan, notes),
        }
        if plan.files != "png":
            path = self.folder / NPZ
            write_npz(path, (*plan.shape[:2], 3), self._read_shards(), plan.labels_of(range(plan.num)), plan.num)
            manifest["npz"] = [path.stat().st_size, sha256(path)]
        shards = self.folder / SHARDS
        write_atomically(shards, json.dumps({"version": SAMPLES_VERSION, "shards": notes}) + "\n")
        manifest["shards_sha256"] = sha256(shards)
        return json.dumps(manifest, indent=2) + "\n"

    def _read_shards(self) -> Iterator[np.ndarray]:
        """The shards' images in order, (n, h, w, c) each."""
        for number in range(self.plan.num_shards):
            indices = self.plan.shard_range(number)
            if self.plan.files == "npz":
                images = np.load(self.path(_array_name(number)), allow_pickle=False)
            else:
                images = np.stack([np.asarray(Image.open(self.folder / self.plan.file_of(k))) for k in indices])
            yield images.reshape(len(indices), *self.plan.shape)
            self.report(f"writing {NPZ}", done=indices.stop)

    def read_result(self) -> tuple[Plan, Mapping[int, Note], Mapping[str, list[Any]]]:
        manifest = read_json(self.folder / MANIFEST, SAMPLES_VERSION)
        path, notes = self.folder / SHARDS, list[Note]()
        if path.is_file() and sha256(path) == manifest.get("shards_sha256"):
            notes = read_json(path, SAMPLES_VERSION).get("shards", [])
        files = {} if self.plan.files == "png" else {NPZ: manifest.get("npz", [])}
        return Plan.from_dict(manifest.get("plan"), self.folder / MANIFEST), dict(enumerate(notes)), files


def _array_name(number: int) -> str:
    return f"shard_{number:06d}.npy"


def _count_machines(plan: Plan, notes: list[Note]) -> list[dict[str, Any]]:
    """The kinds of machines and versions that made the images, and how many each."""
    counts: Counter[str] = Counter()
    for number, note in enumerate(notes):
        counts[json.dumps(note["machine"], sort_keys=True)] += len(plan.shard_range(number))
    return [{**json.loads(key), "images": count} for key, count in counts.items()]
