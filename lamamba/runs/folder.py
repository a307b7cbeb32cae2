"""The folder of a training run: its files, written atomically and read again. To open its networks: lamamba.runs.model.

    RUN/config.json                     the run's configuration, the network's, and what a sampler must know
    RUN/metrics.jsonl                   one line per logged step
    RUN/scores.jsonl                    quick scores, where requested
    RUN/data_files.txt.gz               names of the images of a folder: deleted ones keep their places
    RUN/bad_images.tsv                  files that could not be read, once there are any, and why
    RUN/events.jsonl                    starts, saves, faults and stops, with their time
    RUN/samples/step_00000500.png       sample grids
    RUN/checkpoints/step_00000500/      see lamamba.training.checkpoint; manifest.json has every file's hash

A checkpoint is written under another name, flushed, and renamed: it is complete, or was damaged later, which the
manifest shows. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from lamamba._version import __version__
from lamamba.config import UNetConfig
from lamamba.data.codec import CodecConfig
from lamamba.options.base import Ge, read_record, record
from lamamba.options.training import RUN_VERSION, TrainConfig
from lamamba.runs.metadata import ModelMetadata
from lamamba.utils.distributed import ProcessGroup
from lamamba.utils.errors import RankZeroError
from lamamba.utils.files import append_json, check_folder, differences, flush, sha256, write_all, write_json
from lamamba.utils.text import first_line

logger = logging.getLogger("lamamba.training")

MANIFEST = "manifest.json"


def _hash_of_hashes(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _hash_together(folder: Path, processes: ProcessGroup) -> dict[str, str]:
    """Hashes of all files below a folder, computed by the ranks in parallel.

    Raises:
        OSError: on all ranks, when one cannot read a file.
    """
    processes.wait()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    mine, failure = {}, None
    try:
        mine = {
            path.relative_to(folder).as_posix(): sha256(path)
            for path in files[processes.rank :: processes.world_size]
        }
    except OSError as error:
        failure = str(error)
    hashes: dict[str, str] = {}
    for part, other_failure in processes.gather((mine, failure)):
        if other_failure:
            raise OSError(other_failure)
        hashes |= part
    return dict(sorted(hashes.items()))


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint that training has written, whole or damaged; None for a copy under another step, a link.

    A copy has a whole state.json, of another step; a damaged one is for `check_manifest` to name.
    """
    digits = path.name.removeprefix("step_")
    if not re.fullmatch("[0-9]{8,18}", digits) or path.name != _name(int(digits)):
        return None
    if not path.is_dir() or path.is_symlink():
        return None
    try:
        if CheckpointState.load(path).step != int(digits):
            hashes = read_record(_Manifest, path / MANIFEST).files
            return None if hashes.get("state.json") == sha256(path / "state.json") else int(digits)
    except ValueError:
        pass
    return int(digits)


def _move_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint to damaged_NAME, where it can be inspected."""
    if os.path.lexists(checkpoint):
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)


def _cause(error: BaseException) -> str:
    """The first line of an error; of a rank's own error, where several wrote a checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_cause(inner)}"
    return first_line(error)


@record
class _RunData:
    fingerprint: str | None
    left_out: tuple[str, ...] | None = None


@record
class RunConfig:
    """config.json of a run."""

    version: int
    lamamba: str
    train: dict[str, Any]
    architecture: dict[str, Any]
    sampling: dict[str, Any]
    data: _RunData | None = None
    """None in older runs."""
    teacher: dict[str, str] | None = None
    """Of a distillation: {"sha256": ...}."""
    base: dict[str, str] | None = None
    """The network that a LoRA is for: {"sha256": ...}."""


@record
class CheckpointState:
    """state.json of a checkpoint; entries that older versions did not write have their defaults."""

    step: Annotated[int, Ge(0)]
    version: int = 1
    left_out: Annotated[int, Ge(0)] = 0
    faults: Annotated[int, Ge(0)] = 0
    ema_decays: tuple[float, ...] | None = None
    optimizer_steps: float | None = None
    processes: int | None = None
    device: str | None = None
    torch: str | None = None
    precision: dict[str, Any] | None = None
    sharding: str | None = None

    @classmethod
    def load(cls, checkpoint: Path) -> CheckpointState:
        """Read state.json.

        Raises:
            ValueError: when it is missing or damaged.
        """
        return read_record(cls, checkpoint / "state.json")


@record
class _Manifest:
    version: int
    files: dict[str, str]
    files_sha256: str


def run_values(
    config: TrainConfig, architecture: UNetConfig, metadata: ModelMetadata, fingerprint: str,
    excluded: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        config: of the run.
        architecture: of its network.
        metadata: of its model.
        fingerprint: of the data.
        excluded: files of the data that no index counts, which a restart must exclude again.
    """
    train = config.to_dict()
    train["model"]["objective"] = architecture.objective                        # of the source, or by default
    return json.loads(json.dumps({
        "version": RUN_VERSION, "lamamba": __version__, "train": train,
        "architecture": architecture.to_dict(), "sampling": dataclasses.asdict(metadata),
        "data": {"fingerprint": fingerprint, "left_out": list(excluded)},
    }))


class RunFolder:
    """A run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.metrics = self.path / "metrics.jsonl"
        self.scores = self.path / "scores.jsonl"
        self.bad_images = self.path / "bad_images.tsv"
        self.events = self.path / "events.jsonl"
        self.config = self.path / "config.json"
        self._data_files = self.path / "data_files.txt.gz"

    def prepare(self) -> None:
        """Make the folder, ready to be locked.

        Raises:
            FileExistsError: when it holds something that is not a run.
        """
        if not self.config.exists():
            self._check_empty()
        self.path.mkdir(parents=True, exist_ok=True)

    def check(self, values: Mapping[str, Any]) -> None:
        """Check that the folder takes a run of this configuration; nothing is written.

        A run without a checkpoint may be started again with another configuration.

        Args:
            values: see `run_values`.

        Raises:
            FileExistsError: as `prepare`.
            ValueError: when the folder holds a run with another configuration; every difference is named.
        """
        if not self.config.exists():
            self._check_empty()
        elif self.names():
            self._check_same(self.read_config(), values)

    def _check_empty(self) -> None:
        check_folder(self.path)
        if self.path.is_dir() and any(path.name != ".lock" for path in self.path.iterdir()):
            raise FileExistsError(f"{self.path} exists, is not empty and holds no run; give another folder as out")

    def create(self, values: Mapping[str, Any], data_files: Sequence[str] = ()) -> None:
        """Write config.json, where `check` allows it, and the names of the data's files.

        Raises: as `check`.
        """
        if self.config.exists():
            self.check(values)
        if not self.names():
            for file in (self.scores, self.bad_images, self._data_files):
                file.unlink(missing_ok=True)
            if data_files:
                write_all({self._data_files: gzip.compress("\n".join(data_files).encode(), mtime=0)})
        if unknown := self.unknown_checkpoints():
            logger.warning(
                "%s: %s were not written by this run; training neither reads nor removes them", self.checkpoints,
                ", ".join(unknown)
            )
        self.samples.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_json(self.config, values)

    def read_config(self) -> RunConfig:
        """Read config.json.

        Raises:
            ValueError: when it is missing, damaged or of a newer format.
        """
        config = read_record(RunConfig, self.config, RUN_VERSION)
        TrainConfig.from_dict(config.train, self.config)
        return config

    def architecture(self) -> UNetConfig:
        """The configuration of the run's network.

        Raises:
            ValueError: when config.json is missing or damaged.
        """
        try:
            return UNetConfig.from_dict(self.read_config().architecture)
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from error

    def _check_same(self, saved: RunConfig, new: Mapping[str, Any]) -> None:
        old = {name: value for name, value in vars(saved).items() if name != "data" and value is not None}
        old["train"] = TrainConfig.from_dict(saved.train, self.config).to_dict()    # options that it did not know yet
        old["sampling"] = json.loads(json.dumps(dataclasses.asdict(CodecConfig()))) | old["sampling"]
        may_change = {
            "version", "lamamba", "data", "sampling.version", "sampling.autoencoder", "sampling.guidance",
            "train.data.kind", "train.data.manifest", "train.data.max_bad_images", "train.data.autoencoder",
            "train.steps", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every",
            "train.device", "train.sampling", "train.processes", "train.faults", "train.watch.trackers",
            "train.watch.project", "train.watch.held_out_every", "train.score", "train.distill.teacher",
        }
        found = [
            f"{name}: {before!r} there, {after!r} here"
            for name, before, after in differences(old, new)
            if not any(name == free or name.startswith(free + ".") for free in may_change)
        ]
        if found:
            raise ValueError(
                f"{self.path} holds a run with another configuration ({'; '.join(found)}); "
                "repeat its options to resume it, or give another folder as out"
            )
        old_data, new_data = saved.data, new["data"]                            # older runs did not write it down
        is_known = new_data["fingerprint"] != ""                                # a plan may be made without the data
        if old_data is not None and is_known and old_data.fingerprint != new_data["fingerprint"]:
            raise ValueError(
                f"{self.path} began with other data than {new['train']['data']['source']} holds now (fingerprint "
                f"{str(old_data.fingerprint)[:12]} there, {str(new_data['fingerprint'])[:12]} here): files, classes "
                "or latents were added, removed or made anew. Bring the former ones back to resume, or give another "
                "folder as out"
            )

    def excluded(self) -> tuple[str, ...] | None:
        """Files of the data excluded since the run began; None without a checkpoint, or in older runs.

        Raises:
            ValueError: when config.json is damaged.
        """
        if not self.config.exists() or not self.names():
            return None
        data = self.read_config().data
        return data.left_out if data is not None else None

    def data_files(self) -> list[str]:
        """Names of the data's files when the run began; none without a checkpoint, in older runs, or of other data.

        Raises:
            ValueError: when the list is damaged.
        """
        if not self._data_files.exists() or not self.names():
            return []
        try:
            return gzip.decompress(self._data_files.read_bytes()).decode().split("\n")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self._data_files} is damaged ({error}); where no image was deleted the run resumes without that file"
            ) from error

    def names(self) -> list[str]:
        """Checkpoints by name, oldest first, whole or not: those that training has written here, no copies of them."""
        return [_name(step) for step in self.steps()]

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.checkpoints / _name(step)

    def steps(self) -> list[int]:
        """Their steps."""
        return sorted(step for step in map(_step_of, self._candidates()) if step is not None)

    def unknown_checkpoints(self) -> list[str]:
        """Names like a checkpoint's that training has not written: copies, links, files."""
        return sorted(path.name for path in self._candidates() if _step_of(path) is None)

    def _candidates(self) -> list[Path]:
        return list(self.checkpoints.glob("step_*")) if self.checkpoints.is_dir() else []

    def log_event(self, event: str, **values: Any) -> None:
        """Append an event of the run, with its time, to events.jsonl. A full disk is logged, not raised."""
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": event, **values}
        try:
            append_json(self.events, line)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.events, error)

    def save(
        self, step: int, fill: Callable[[Path], None], processes: ProcessGroup, *, keep: int, keep_every: int = 0
    ) -> Path:
        """Write the checkpoint of a step under another name, hash, flush and rename it; then remove the oldest.

        A whole checkpoint of that step stays as it is: a resumed run repeats the same bits.

        Args:
            step: optimizer steps done.
            fill: writes the checkpoint's files into the given folder; called on all ranks.
            processes: all ranks must call this.
            keep: newest checkpoints that stay.
            keep_every: checkpoints at multiples of so many steps stay, too.

        Raises:
            OSError: when the disk is full or not writable; older checkpoints are untouched and nothing is left behind.
            RankZeroError: on the other ranks.
        """
        checkpoint = self.checkpoint(step)
        temporary = self.checkpoints / f".tmp_{checkpoint.name}"
        try:
            if not processes.broadcast(processes.on_rank_0(lambda: self._begin_save(checkpoint, temporary))):
                return checkpoint
            fill(temporary)
            hashes = _hash_together(temporary, processes)
            processes.on_rank_0(lambda: self._finish_save(checkpoint, temporary, hashes))
            processes.on_rank_0(lambda: self._remove_old(step, keep, keep_every))
        except RankZeroError:
            raise
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            newest = self.names()[-1] if self.names() else "none"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.checkpoints}: {_cause(error)}; the "
                f"newest whole one stays ({newest}). Make room or mend the disk"
            ) from error
        return checkpoint

    def _begin_save(self, checkpoint: Path, temporary: Path) -> bool:
        """Make the temporary folder; False where the checkpoint exists and is whole."""
        if _step_of(checkpoint) is not None:
            try:
                check_manifest(checkpoint)
                return False                                                    # replacing a whole one would risk it
            except ValueError:
                pass
        for leftover in self.checkpoints.glob(".*_step_*"):                     # by a kill during a save
            if re.fullmatch("[.](tmp|old)_step_[0-9]{8,}", leftover.name):
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        return True

    def _finish_save(self, checkpoint: Path, temporary: Path, hashes: dict[str, str]) -> None:
        """Write the manifest, flush all files, and rename the folder."""
        values = {"version": RUN_VERSION, "files": hashes, "files_sha256": _hash_of_hashes(hashes)}
        write_json(temporary / MANIFEST, values)
        folders = {(temporary / name).parent for name in hashes} | {temporary}
        for path in [*(temporary / name for name in hashes), temporary / MANIFEST, *folders]:
            flush(path)
        _move_aside(checkpoint)                                                 # a damaged one, or a copy of another
        os.replace(temporary, checkpoint)
        flush(self.checkpoints)

    def _remove_old(self, saved: int, keep: int, keep_every: int) -> None:
        for step in self.steps()[:-keep]:
            if step != saved and (not keep_every or step % keep_every):
                dropped = self.checkpoints / f".old_{_name(step)}"              # never half a checkpoint of that name
                os.replace(self.checkpoint(step), dropped)
                shutil.rmtree(dropped)

    def newest(self) -> Path | None:
        """The newest checkpoint, checked file by file; None where there is none.

        Raises:
            ValueError: naming the damaged file, when the newest checkpoint is not whole.
        """
        names = self.names()
        if not names:
            return None
        checkpoint = self.checkpoints / names[-1]
        check_manifest(checkpoint)
        return checkpoint

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that is whole, to resume from; damaged ones are named in the log and moved aside.

        Raises:
            ValueError: when there are checkpoints and none is whole: starting afresh would bury the run.
        """
        faults = []
        for name in reversed(self.names()):
            checkpoint = self.checkpoints / name
            try:
                check_manifest(checkpoint)
            except ValueError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                logger.warning("%s. Going on from %s", fault, name)
                self.log_event("damaged", fault=fault, used=name)
            for newer in self.names():
                if newer > name:
                    _move_aside(self.checkpoints / newer)
            return checkpoint
        if faults:
            raise ValueError(f"no checkpoint of {self.path} is whole: {'; '.join(faults)}")
        return None


def check_manifest(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its hash.

    Raises:
        ValueError: naming the first file that is missing or changed.
    """
    hint = "remove the folder to go on from an older one"
    manifest = read_record(_Manifest, checkpoint / MANIFEST, RUN_VERSION)
    if manifest.files_sha256 != _hash_of_hashes(manifest.files):
        raise ValueError(f"{checkpoint} is damaged: {MANIFEST} was changed; {hint}")
    for name, digest in manifest.files.items():
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint} is damaged: {name} is missing; {hint}")
        if sha256(checkpoint / name) != digest:
            raise ValueError(f"{checkpoint} is damaged: {name} is not what was written (truncated or changed); {hint}")
