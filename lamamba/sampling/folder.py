"""As many images as one likes, on disk: by one process or by many, killed and started again as it happens.

The images are cut into shards of one batch each, which processes claim (lamamba/utils/shards.py). A shard's files are
written under other names, flushed to disk and renamed; then a note says what they hold. Image k is a function of the
plan and of k, so it does not matter who makes it, or when.

    DIR/000000.png ...       the images, each with its settings
    DIR/samples.npz          or (and) all of them in the field's format, put together at the end
    DIR/manifest.json        the plan, machines and versions, hashes: all that is needed to repeat it
    DIR/shards.json          every file's size and hash
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lamamba.sampling.npz import write_npz
from lamamba.sampling.plan import MANIFEST, NPZ, SAMPLES_VERSION, SHARDS, UNFINISHED, Plan
from lamamba.sampling.settings import png_text
from lamamba.utils.files import flush, read_json, sha256, temporary_name, write_atomically
from lamamba.utils.shards import PlannedFolder

logger = logging.getLogger("lamamba.sampling")

MakeImages = Callable[[range, Callable[[float], None]], np.ndarray]
"""(places of a shard, told the share that is done) -> uint8 images (n, h, w, c)."""
MAX_ROUNDS = 3
"""Times that damaged shards are made anew before a disk is called broken."""
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class Progress:
    """What sampling tells while it goes on."""

    images: int
    """Of the finished shards, whoever made them, and of this process's current one."""
    total: int
    phase: str
    """"sampling", "waiting" (for other processes), "verifying", or "packing" (the npz)."""


def sample_many(
    plan: Plan, folder: str | Path, make_images: MakeImages, *, rank: int = 0, machine: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Make the images that are not there yet, together with any other processes that do the same.

    Args:
        plan: what to make.
        folder: new, or with what an earlier call or another process has made by the same plan.
        make_images: makes the images of some places, as the plan says.
        rank: this process's number among those that start together, so that they begin at different shards.
        machine: device and versions, for the manifest.
        on_progress: told often.

    Returns:
        The manifest, when all images are there and verified.

    Raises:
        FileExistsError: when the folder holds something else.
        ValueError: when it holds images of another plan, with the differences.
        OSError: when the disk is full or broken; what is whole stays.
    """
    job = _Job(plan, Path(folder), make_images, rank, dict(machine or {}), on_progress or (lambda progress: None))
    with job.explained():
        if not job.is_whole():
            job.shared.begin()
            for _ in range(MAX_ROUNDS):
                job.make_shards()
                if job.finish():
                    break
            else:
                raise OSError(f"shards of {folder} were damaged {MAX_ROUNDS} times as soon as they were written")
        job.tidy_up()
    return read_json(Path(folder) / MANIFEST, SAMPLES_VERSION)


class _Job:
    """One process's part."""

    def __init__(
        self, plan: Plan, folder: Path, make_images: MakeImages, rank: int, machine: dict[str, str],
        tell: Callable[[Progress], None],
    ):
        self._plan, self._folder, self._make_images = plan, folder, make_images
        self._machine, self._tell = machine, tell
        self.shared = PlannedFolder(
            folder, UNFINISHED, plan, Plan.from_dict, version=SAMPLES_VERSION, what="images", is_over=self._is_finished,
        )
        self._work, self._claims = self.shared.work, self.shared.claims
        start = rank % plan.num_shards
        self._order = [*range(start, plan.num_shards), *range(start)]
        self._done: set[int] = set()

    def _is_finished(self) -> bool:
        return (self._folder / MANIFEST).is_file()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of a disk that takes no more what is there, and what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            images = sum(len(self._plan.shard_range(number)) for number in self._done)
            raise OSError(
                f"{self._folder} takes no more ({error.strerror}): {images:,} of {self._plan.num:,} images are whole "
                "and stay; make room and run the same command again"
            ) from error

    # a folder that is finished, or seems so

    def is_whole(self) -> bool:
        """Whether all is there already, by the same plan. Where files are damaged, the whole ones are kept."""
        if not self._is_finished():
            return False
        manifest = read_json(self._folder / MANIFEST, SAMPLES_VERSION)
        self.shared.check_same(Plan.from_dict(manifest.get("plan", {})))
        notes = self._read_notes(manifest)
        whole, faults = {}, []
        for number, note in notes.items():
            fault = self._fault(note) if self._plan.files != "npz" else None
            self._report("verifying", done=self._plan.shard_range(number).stop)
            if fault:
                faults.append(fault)
            else:
                whole[number] = note
        if self._plan.files != "png" and (fault := self._fault({"files": {NPZ: manifest.get("npz")}})):
            faults.append(fault)
            whole = whole if self._plan.files == "both" else {}
        if len(whole) == self._plan.num_shards and not faults:
            return True
        lost = self._plan.num_shards - len(whole)
        logger.warning("%s: %d shards of images are made anew", "; ".join(faults[:3]) or f"{SHARDS} is damaged", lost)
        self._work.mkdir(exist_ok=True)
        with self._claims.claim("finish", waits=True):
            if self._is_finished():
                self.shared.write_plan()
                for number, note in whole.items():
                    write_atomically(self._note(number), json.dumps(note) + "\n")
                (self._folder / MANIFEST).unlink()
        return False

    def _read_notes(self, manifest: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Of all shards; none where their file is not what the manifest says."""
        path = self._folder / SHARDS
        if not path.is_file() or sha256(path) != manifest.get("shards_sha256"):
            return {}
        return dict(enumerate(read_json(path, SAMPLES_VERSION)["shards"]))

    def _fault(self, note: Mapping[str, Any]) -> str | None:
        """What is wrong with a shard's files, compared by content."""
        for name, size_and_hash in note["files"].items():
            path = self._place(name)
            if not path.is_file():
                return f"{path} is missing"
            if [path.stat().st_size, sha256(path)] != size_and_hash:
                return f"{path} is not what was written"
        return None

    def _place(self, name: str) -> Path:
        return (self._work if name.endswith(".npy") else self._folder) / name

    # making

    def make_shards(self) -> None:
        """Make what nobody has made or is making, then wait for the others."""
        for number in self._order:                                              # what was there before counts at once
            self._look(number)
        self._report("sampling")
        self._claims.make_all(
            self._order, lambda number: f"shard_{number:06d}", self._is_made, self._make,
            lambda: self._report("waiting"),
        )

    def _note(self, number: int) -> Path:
        return self._work / f"shard_{number:06d}.json"

    def _is_made(self, number: int) -> bool:
        """Whether a shard is finished; tells of those that others have made."""
        known = number in self._done
        if known or not self._look(number):
            return known
        self._report("sampling")
        return True

    def _look(self, number: int) -> bool:
        """Whether a shard's note is there, and its files have the sizes that the note says."""
        try:
            files = read_json(self._note(number), SAMPLES_VERSION)["files"]
            if any(self._place(name).stat().st_size != size for name, (size, _) in files.items()):
                return False
        except (ValueError, KeyError, OSError):
            return False
        self._done.add(number)
        return True

    def _make(self, number: int) -> None:
        """Make one shard and put it in its place."""
        places = self._plan.shard_range(number)
        images = self._make_images(places, lambda share: self._report("sampling", share * len(places)))
        expected = (len(places), *self._plan.shape)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"images came as {images.dtype} {images.shape}, the plan wants uint8 {expected}")
        files = self._write_files({
            name: data for name, data in (
                ((self._piece(number), _npy(images)),) if self._plan.files == "npz" else
                ((self._plan.file_of(k), self._png(k, image)) for k, image in zip(places, images, strict=True))
            )
        })
        note = {
            "version": SAMPLES_VERSION, "files": files, "pixels_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
            "machine": self._machine,
        }
        write_atomically(self._note(number), json.dumps(note) + "\n")
        self._done.add(number)
        self._report("sampling")

    def _piece(self, number: int) -> str:
        return f"shard_{number:06d}.npy"

    def _png(self, k: int, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(buffer, format="PNG", pnginfo=png_text(self._plan.facts_of(k)))
        return buffer.getvalue()

    def _write_files(self, contents: Mapping[str, bytes]) -> dict[str, list[int | str]]:
        """All under other names first, on the disk, then renamed: their sizes and hashes."""
        temporaries = {name: temporary_name(self._place(name)) for name in contents}
        try:
            for name, data in contents.items():
                temporaries[name].write_bytes(data)
                flush(temporaries[name])
            for name, temporary in temporaries.items():
                os.replace(temporary, self._place(name))
        finally:
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)
        if os.name != "nt":
            for folder in {self._place(name).parent for name in contents}:
                flush(folder)
        return {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in contents.items()}

    # finishing

    def finish(self) -> bool:
        """Verify all shards, put the npz together, write the manifest: one process does it, the others wait for it.

        False where a shard turned out to be damaged, and is to be made again.
        """
        plan = self._plan
        with self._claims.claim("finish", waits=True):
            if self._is_finished():
                return True
            notes = []
            for number in range(plan.num_shards):
                try:
                    note = read_json(self._note(number), SAMPLES_VERSION)
                except ValueError:                                              # another process found it damaged
                    self._done.discard(number)
                    continue
                if fault := self._fault(note):
                    logger.warning("%s: the shard is made anew", fault)
                    self._note(number).unlink(missing_ok=True)
                    self._done.discard(number)
                notes.append(note)
                self._report("verifying", done=plan.shard_range(number).stop)
            if len(self._done) < plan.num_shards:
                return False
            manifest = {
                "version": SAMPLES_VERSION, "plan": plan.to_dict(), "files": plan.files, "images": plan.num,
                "pixels_sha256": _hash_of_hashes(note["pixels_sha256"] for note in notes),
                "machines": _count_machines(plan, notes),
            }
            if plan.files != "png":
                path = self._folder / NPZ
                labels = plan.labels_of(range(plan.num))
                write_npz(path, (*plan.shape[:2], 3), self._read_pieces(), labels, plan.num)
                manifest["npz"] = [path.stat().st_size, sha256(path)]
            shards = self._folder / SHARDS
            write_atomically(shards, json.dumps({"version": SAMPLES_VERSION, "shards": notes}) + "\n")
            manifest["shards_sha256"] = sha256(shards)
            for path in self._folder.glob(".*.tmp"):                            # of killed processes
                path.unlink(missing_ok=True)
            write_atomically(self._folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        return True

    def tidy_up(self) -> None:
        """Remove what only the work needed; a process that was killed at the very end has left it."""
        if self._work.is_dir():
            with self._claims.claim("finish", waits=True):
                if self._is_finished():
                    shutil.rmtree(self._work, ignore_errors=True)

    def _read_pieces(self) -> Iterator[np.ndarray]:
        """The shards' images in order, (n, h, w, c) each."""
        for number in range(self._plan.num_shards):
            places = self._plan.shard_range(number)
            if self._plan.files == "npz":
                piece = np.load(self._place(self._piece(number)), allow_pickle=False)
            else:
                piece = np.stack([_read_png(self._folder / self._plan.file_of(k)) for k in places])
            yield piece.reshape(len(places), *self._plan.shape)
            self._report("packing", done=places.stop)

    def _report(self, phase: str, in_hand: float = 0, done: int | None = None) -> None:
        plan = self._plan
        if done is None:
            done = int(sum(len(plan.shard_range(number)) for number in self._done) + in_hand)
        self._tell(Progress(done, plan.num, phase))


def _npy(images: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, images, allow_pickle=False)
    return buffer.getvalue()


def _read_png(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def _hash_of_hashes(hashes: Iterator[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _count_machines(plan: Plan, notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kinds of machines and versions that made the images, and how many each."""
    counts: dict[str, int] = {}
    for number, note in enumerate(notes):
        key = json.dumps(note["machine"], sort_keys=True)
        counts[key] = counts.get(key, 0) + len(plan.shard_range(number))
    return [{**json.loads(key), "images": count} for key, count in counts.items()]
