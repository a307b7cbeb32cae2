"""What a run leaves on disk, and how it is found again.

    RUN/config.json                     the run's configuration, the network's, and what a sampler must know
    RUN/metrics.jsonl                   one line per logged step
    RUN/samples/step_00000500.png       sample grids
    RUN/checkpoints/step_00000500/      model/ and ema/ (diffusers folders), optimizer.safetensors,
                                        sampling.json, state.json and manifest.json with every file's hash

A checkpoint is written beside its place, flushed, and renamed into it: a folder of that name is whole or damaged by
something else, which the manifest shows. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamamba._version import __version__
from lamamba.config import Objective, UNetConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.training.config import RUN_VERSION, TrainConfig

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class SamplingFacts:
    """What a sampler must know of a trained network besides its weights; saved with them as sampling.json."""

    objective: Objective
    """What the network predicts, and so which samplers fit."""
    image_size: int
    """Side of the images in pixels."""
    codec: str = "pixels"
    """How images become the network's input: "pixels" (scaled to [-1, 1]) or "latents" (of an autoencoder)."""
    scale: float = 1.0
    """Factor on the codec's output before the network sees it (latents; 1 for pixels)."""
    label_names: tuple[str, ...] = ()
    """One name per class."""
    version: int = RUN_VERSION

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SamplingFacts:
        """Read sampling.json.

        Raises:
            ValueError: when it is damaged or of a newer format.
        """
        values = read_json(path)
        check_version(path, values)
        known = {f.name for f in dataclasses.fields(cls)}
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        if unknown := values.keys() - known:
            raise ValueError(f"{path} has unknown entries: {', '.join(sorted(unknown))}")
        try:
            return cls(**plain)
        except TypeError as error:
            raise ValueError(f"{path} is incomplete: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: when the file is missing or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def check_version(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a file of a newer format than this code reads."""
    version = values.get("version")
    if not isinstance(version, int) or version > RUN_VERSION:
        raise ValueError(f"{path} has format version {version}, this lamamba reads up to {RUN_VERSION}; upgrade it")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that it is always the old one or the new one, never half of either."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash_of_hashes(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


@dataclass
class TrainState:
    """Everything that training changes."""

    model: LaMambaUNet
    ema: LaMambaUNet
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done."""


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory under the parameters' names: "exp_avg/head.linear.weight", ..."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        key, name = full.split("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device)            # a fused AdamW counts steps there, too


class RunFolder:
    """A run's place on disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / "config.json"

    def create(self, config: TrainConfig, architecture: UNetConfig, facts: SamplingFacts) -> None:
        """Make the folder, or check that it belongs to the very same run.

        Raises:
            ValueError: when the folder holds a run with another configuration; every difference is named.
            FileExistsError: when the folder holds something that is not a run.
        """
        values = {
            "version": RUN_VERSION, "lamamba": __version__, "train": config.to_dict(),
            "architecture": architecture.to_dict(), "sampling": dataclasses.asdict(facts),
        }
        values = json.loads(json.dumps(values))
        if self.config.exists():
            self._check_same(read_json(self.config), values)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise FileExistsError(f"{self.path} exists, is not empty and holds no run; give another folder with --out")
        self.samples.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_atomically(self.config, json.dumps(values, indent=2) + "\n")

    def _check_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        check_version(self.config, old)
        may_change = {
            "train.steps", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.device",
            "train.sampling", "lamamba",
        }
        differences = [
            f"{name}: {before!r} there, {after!r} here"
            for name, before, after in _differences(old, new)
            if not any(name == free or name.startswith(free + ".") for free in may_change)
        ]
        if differences:
            raise ValueError(
                f"{self.path} holds a run with another configuration ({'; '.join(differences)}); "
                "repeat its options to resume it, or give another folder with --out"
            )

    def names(self) -> list[str]:
        """Checkpoints by name, oldest first, whole or not."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(path.name for path in self.checkpoints.iterdir() if path.name.startswith("step_"))

    def save(self, state: TrainState, facts: SamplingFacts, keep: int) -> Path:
        """Write a checkpoint of this step and drop the oldest ones beyond `keep`, in this order.

        Raises:
            OSError: when the disk is full or not writable; older checkpoints are untouched.
        """
        place = self.checkpoints / f"step_{state.step:08d}"
        temporary = self.checkpoints / f".tmp_{place.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state.model.save_pretrained(temporary / "model")
        state.ema.save_pretrained(temporary / "ema")
        facts.save(temporary / "sampling.json")
        tensors = optimizer_tensors(state.model, state.optimizer) | {"random/torch": torch.get_rng_state()}
        save_file(tensors, temporary / "optimizer.safetensors")
        state_values = {"version": RUN_VERSION, "step": state.step}
        (temporary / "state.json").write_text(json.dumps(state_values) + "\n", encoding="utf-8")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        hashes = {path.relative_to(temporary).as_posix(): _hash(path) for path in files}
        manifest = {"version": RUN_VERSION, "files": hashes, "files_sha256": _hash_of_hashes(hashes)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in [*files, temporary / MANIFEST, temporary / "model", temporary / "ema", temporary]:
            _flush(path)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(temporary, place)
        _flush(self.checkpoints)
        for name in self.names()[:-keep]:
            shutil.rmtree(self.checkpoints / name)
        return place

    def newest(self) -> Path | None:
        """The newest checkpoint, checked file by file; None where there is none.

        Raises:
            ValueError: naming the damaged file, when the newest checkpoint is not whole.
        """
        names = self.names()
        if not names:
            return None
        place = self.checkpoints / names[-1]
        check_manifest(place)
        return place

    def restore(self, state: TrainState) -> bool:
        """Continue from the newest checkpoint; whether there was one.

        Raises:
            ValueError: when the checkpoint is damaged or belongs to another network.
        """
        place = self.newest()
        if place is None:
            return False
        for name, target in (("model", state.model), ("ema", state.ema)):
            saved = load_network(place / name)
            if saved.architecture != target.architecture:
                raise ValueError(f"{place / name} is a network with another configuration: {saved.architecture}")
            target.load_state_dict(saved.state_dict())
        tensors = load_file(place / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("random/torch"))
        restore_optimizer(state.model, state.optimizer, tensors)
        state.step = int(read_json(place / "state.json")["step"])
        return True


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            child = f"{name}.{key}" if name else str(key)
            found += _differences(old.get(key, "nothing"), new.get(key, "nothing"), child)
        return found
    return [] if old == new else [(name, old, new)]


def check_manifest(place: Path) -> None:
    """Compare every file of a checkpoint with its hash.

    Raises:
        ValueError: naming the first file that is missing or changed.
    """
    manifest = read_json(place / MANIFEST)
    check_version(place / MANIFEST, manifest)
    if manifest.get("files_sha256") != _hash_of_hashes(manifest.get("files", {})):
        raise ValueError(f"{place} is damaged: {MANIFEST} was changed; remove the folder to go on from an older one")
    for name, digest in manifest["files"].items():
        if not (place / name).is_file():
            raise ValueError(f"{place} is damaged: {name} is missing; remove the folder to go on from an older one")
        if _hash(place / name) != digest:
            raise ValueError(
                f"{place} is damaged: {name} is not what was written (truncated or changed); "
                "remove the folder to go on from an older one"
            )


def load_network(folder: Path) -> LaMambaUNet:
    """A network saved by `save_pretrained`, with one clear error for whatever is wrong with it.

    Raises:
        FileNotFoundError: when the folder holds no network.
        ValueError: when its files are damaged or do not fit together.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no network: there is no config.json in it")
    read_json(folder / "config.json")
    try:
        return LaMambaUNet.from_pretrained(folder, local_files_only=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"the weights in {folder} are missing or damaged: {str(error).splitlines()[0]}") from error


def find_network(path: str | Path) -> tuple[LaMambaUNet, SamplingFacts]:
    """The network to sample from: a run folder (the newest checkpoint's EMA weights), a checkpoint, or a model folder.

    Raises:
        FileNotFoundError: when there is nothing of the kind at that place.
        ValueError: when it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder, a checkpoint or a saved model")
    if (path / "checkpoints").is_dir():
        newest = RunFolder(path).newest()
        if newest is None:
            raise FileNotFoundError(f"{path} is a run without a checkpoint yet; train it further")
        path = newest
    elif (path / MANIFEST).is_file():
        check_manifest(path)
    network = path / "ema" if (path / "ema").is_dir() else path
    model = load_network(network)
    facts_file = path / "sampling.json"
    if not facts_file.is_file():
        raise FileNotFoundError(f"{path} has no sampling.json, so the kind of images it makes is unknown")
    return model, SamplingFacts.load(facts_file)
