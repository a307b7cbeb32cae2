"""The folder of a training run: its files, written atomically and read again. To open its networks: lamamba.runs.model.

    RUN/config.json                     the run's configuration, the network's, and what a sampler must know
    RUN/metrics.jsonl                   one line per logged step
    RUN/scores.jsonl                    quick scores, where requested
    RUN/bad_images.tsv                  files that could not be read, once there are any, and why
    RUN/events.jsonl                    starts, saves, faults and stops, with their time
    RUN/samples/step_00000500.png       sample grids
    RUN/checkpoints/step_00000500/      see lamamba.training.checkpoint; manifest.json has every file's hash

A checkpoint is written under another name, flushed, and renamed: it is complete, or was damaged later, which the
manifest shows. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from lamamba.utils.errors import MainProcessError
from lamamba.utils.files import differences, flush, sha256, write_atomically, write_json

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


def _move_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint to damaged_NAME, where it can be inspected."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)


def _cause(error: BaseException) -> str:
    """The first line of an error; of a rank's own error, where several wrote a checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_cause(inner)}"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@record
@dataclass(frozen=True, kw_only=True)
class _RunData:
    fingerprint: str | None
    left_out: tuple[str, ...] | None = None


@record
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """config.json of a run."""

    version: int
    lamamba: str
    train: dict[str, Any]
    architecture: dict[str, Any]
    sampling: dict[str, Any]
    data: _RunData | None = None
    """None in older runs."""


@record
@dataclass(frozen=True, kw_only=True)
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
@dataclass(frozen=True, kw_only=True)
class _Manifest:
    version: int
    files: dict[str, str]
    files_sha256: str


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

    def prepare(self) -> None:
        """Make the folder, ready to be locked.

        Raises:
            FileExistsError: when it holds something that is not a run.
        """
        if not self.config.exists() and self.path.is_dir() and any(p.name != ".lock" for p in self.path.iterdir()):
            raise FileExistsError(f"{self.path} exists, is not empty and holds no run; give another folder with --out")
        self.path.mkdir(parents=True, exist_ok=True)

    def create(
        self, config: TrainConfig, architecture: UNetConfig, metadata: ModelMetadata, fingerprint: str | None = None,
        excluded: Sequence[str] = (),
    ) -> None:
        """Write config.json, or check that the folder holds a run of the same configuration.

        A run without a checkpoint may be started again with another configuration.

        Args:
            config: of the run.
            architecture: of its network.
            metadata: of its model.
            fingerprint: of the data.
            excluded: files of the data that no index counts, which a restart must exclude again.

        Raises:
            ValueError: when the folder holds a run with another configuration; every difference is named.
        """
        values = {
            "version": RUN_VERSION, "lamamba": __version__, "train": config.to_dict(),
            "architecture": architecture.to_dict(), "sampling": dataclasses.asdict(metadata),
            "data": {"fingerprint": fingerprint, "left_out": list(excluded)},
        }
        values = json.loads(json.dumps(values))
        if self.config.exists() and self.names():
            self._check_same(self.read_config(), values)
        else:
            for file in (self.scores, self.bad_images):
                file.unlink(missing_ok=True)
        self.samples.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_atomically(self.config, json.dumps(values, indent=2) + "\n")

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

    def _check_same(self, saved: RunConfig, new: dict[str, Any]) -> None:
        old = {entry.name: getattr(saved, entry.name) for entry in dataclasses.fields(saved) if entry.name != "data"}
        old["train"] = TrainConfig.from_dict(saved.train, self.config).to_dict()    # options that it did not know yet
        old["sampling"] = json.loads(json.dumps(dataclasses.asdict(CodecConfig()))) | old["sampling"]
        may_change = {
            "version", "lamamba", "data", "sampling.version", "sampling.autoencoder", "sampling.guidance",
            "train.data.kind", "train.data.manifest", "train.data.max_bad_images", "train.data.autoencoder",
            "train.steps", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every",
            "train.device", "train.sampling", "train.processes", "train.faults", "train.watch.trackers",
            "train.watch.project", "train.watch.held_out_every", "train.score",
        }
        found = [
            f"{name}: {before!r} there, {after!r} here"
            for name, before, after in differences(old, new)
            if not any(name == free or name.startswith(free + ".") for free in may_change)
        ]
        if found:
            raise ValueError(
                f"{self.path} holds a run with another configuration ({'; '.join(found)}); "
                "repeat its options to resume it, or give another folder with --out"
            )
        old_data, new_data = saved.data, new["data"]                            # older runs did not write it down
        if old_data is not None and old_data.fingerprint != new_data["fingerprint"]:
            raise ValueError(
                f"{self.path} began with other data than {new['train']['data']['source']} holds now (fingerprint "
                f"{str(old_data.fingerprint)[:12]} there, {str(new_data['fingerprint'])[:12]} here): files, classes "
                "or latents were added, removed or made anew. Bring the former ones back to resume, or give another "
                "folder with --out"
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

    def names(self) -> list[str]:
        """Checkpoints by name, oldest first, whole or not."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(path.name for path in self.checkpoints.iterdir() if path.name.startswith("step_"))

    def log_event(self, event: str, **values: Any) -> None:
        """Append an event of the run, with its time, to events.jsonl. A full disk is logged, not raised."""
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": event, **values}
        try:
            with self.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
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
            MainProcessError: on the other ranks.
        """
        checkpoint = self.checkpoints / f"step_{step:08d}"
        temporary = self.checkpoints / f".tmp_{checkpoint.name}"
        try:
            if not processes.broadcast(processes.on_rank_0(lambda: self._begin_save(checkpoint, temporary))):
                return checkpoint
            fill(temporary)
            hashes = _hash_together(temporary, processes)
            processes.on_rank_0(lambda: self._finish_save(checkpoint, temporary, hashes))
            processes.on_rank_0(lambda: self._remove_old(keep, keep_every))
        except MainProcessError:
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
        if checkpoint.exists():
            try:
                check_manifest(checkpoint)
                return False                                                    # replacing a whole one would risk it
            except ValueError:
                pass
        for leftover in self.checkpoints.glob(".*_step_*"):                     # by a kill during a save
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
        _move_aside(checkpoint)                                                 # a damaged one of this step
        os.replace(temporary, checkpoint)
        flush(self.checkpoints)

    def _remove_old(self, keep: int, keep_every: int) -> None:
        for name in self.names()[:-keep]:
            if not keep_every or int(name.removeprefix("step_")) % keep_every:
                dropped = self.checkpoints / f".old_{name}"                     # never half a checkpoint of that name
                os.replace(self.checkpoints / name, dropped)
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
            raise ValueError(
                f"{checkpoint} is damaged: {name} is not what was written (truncated or changed); {hint}"
            )
