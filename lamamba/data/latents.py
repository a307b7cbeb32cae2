"""Latents on disk: what lamamba encode writes and training reads.

    latents/index.json                  what the latents are (image size, autoencoder, scaling), and of each shard its
                                        hash and the labels and file names of its images
    latents/shard_00000.safetensors     moments (images, views, parts, c, h, w): views are the image and its mirror
                                        image (or the image alone), parts are mean and standard deviation of the
                                        autoencoder's posterior (or the latents alone, where it has none)

Mean and deviation of one view lie side by side: reading a sample is one short read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig
from lamamba.data.sets import SampleDraws
from lamamba.utils.files import read_json, sha256
from lamamba.utils.progress import Progress, Report
from lamamba.utils.shards import ShardPlan

LATENTS_VERSION = 1
INDEX = "index.json"
UNFINISHED = ".encoding"
"""Folder of unfinished work in it (lamamba/utils/shards.py)."""
MOMENTS = "moments"
STORAGE = {"float16": torch.float16, "float32": torch.float32}


def is_latents(folder: str | Path) -> bool:
    """Whether a folder was made by lamamba encode, finished or not."""
    return (Path(folder) / INDEX).is_file() or (Path(folder) / UNFINISHED).is_dir()


_JSON_NAMES = {"codec": "facts", "excluded": "left_out"}
"""Of fields that the files call otherwise."""
_FIELDS = {name: field for field, name in _JSON_NAMES.items()}


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Plan(ShardPlan):
    """All that decides what the shards hold: equal plans give the same bytes."""

    source: str
    """The images, as they were named."""
    source_fingerprint: str
    """Of their names, classes and order, and of the excluded files."""
    images: int
    """Without the files that were known to be bad."""
    image_size: int
    crop: str
    views: int
    """2: the image and its mirror image; 1: the image alone."""
    parts: int
    """2: mean and standard deviation; 1: an autoencoder without a posterior."""
    shape: tuple[int, int, int]
    """(c, h, w) of one latent."""
    storage: str
    """float16 or float32."""
    codec: CodecConfig
    """Autoencoder and scaling; "facts" in JSON."""
    compute: str
    """Data type in which the autoencoder worked."""
    batch_size: int
    """Images per batch of the autoencoder: another number would round otherwise."""
    threads: int
    """Of a process on a CPU: another number would round otherwise, too; 0 on GPUs."""
    shard_size: int
    """Images of a shard, but for the last."""
    label_names: tuple[str, ...]
    excluded: tuple[str, ...] | None = None
    """Files known to be bad when encoding began; None in older folders. "left_out" in JSON."""

    @property
    def sizes(self) -> tuple[int, int]:
        return self.images, self.shard_size

    def to_dict(self) -> dict[str, Any]:
        values = _renamed(json.loads(json.dumps(dataclasses.asdict(self))), _JSON_NAMES)
        if self.excluded is None:
            del values["left_out"]                                              # older folders keep their fingerprint
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        try:
            codec = CodecConfig(**_with_tuples(values["facts"]))
            return cls(**_with_tuples(_renamed(values, _FIELDS)) | {"codec": codec})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan is damaged or of another version: {error}") from error

    def compared(self) -> dict[str, Any]:
        values = self.to_dict()
        codec = values.pop("facts")
        for counted_otherwise in ("source", "label_names", "left_out"):         # by the source's fingerprint
            values.pop(counted_otherwise, None)
        codec.pop("autoencoder")                                                # its hash counts, not its name
        return values | codec


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished shard."""

    file: str
    bytes: int
    sha256: str
    labels: tuple[int, ...]
    files: tuple[str, ...]
    excluded: dict[str, str]
    """Images that could not be decoded when the shard was made, and why; "left_out" in JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _renamed(vars(self), _JSON_NAMES)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shard:
        """Undo `to_dict`."""
        return cls(**_with_tuples(_renamed(values, _FIELDS)))


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


@dataclass(frozen=True)
class Index:
    """index.json."""

    plan: Plan
    shards: tuple[Shard, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shards = [shard.to_dict() for shard in self.shards]
        return {"version": LATENTS_VERSION, "plan": self.plan.to_dict(), "shards": shards}

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read the index of a finished folder.

        Raises:
            FileNotFoundError: when the folder holds no latents.
            ValueError: when encoding has not finished there, or the index is damaged or of a newer format.
        """
        path = folder / INDEX
        if not path.is_file():
            if (folder / UNFINISHED).is_dir():
                raise ValueError(f"{folder} is not finished: run the same lamamba encode command again, it goes on")
            raise FileNotFoundError(f"{folder} holds no latents (no {INDEX}); make them with lamamba encode")
        values = read_json(path, LATENTS_VERSION)
        try:
            return cls(Plan.from_dict(values["plan"]), tuple(Shard.from_dict(shard) for shard in values["shards"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all latents, labels and the plan."""
        digest = hashlib.sha256(json.dumps(self.plan.to_dict(), sort_keys=True).encode())
        for shard in self.shards:
            digest.update(f"{shard.sha256} {shard.labels}\n".encode())
        return digest.hexdigest()


_MEND = "Run the same lamamba encode command again: it makes this shard anew and keeps the others"


def check_size(folder: Path, shard: Shard) -> None:
    """Check that a shard has its size.

    Raises:
        ValueError: naming the file when it is missing or has not.
    """
    path = folder / shard.file
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
        raise ValueError(f"{path} {found}: it is damaged or truncated. {_MEND}")


def check_shard(folder: Path, plan: Plan, shard: Shard) -> None:
    """Check size, hash and shape of a shard.

    Raises:
        ValueError: naming the file when one differs.
    """
    check_size(folder, shard)
    path = folder / shard.file
    if sha256(path) != shard.sha256:
        raise ValueError(f"{path} is damaged: its content is not what was written. {_MEND}")
    expected = [len(shard.labels), plan.views, plan.parts, *plan.shape]
    try:
        with safe_open(path, "pt") as file:
            shape = file.get_slice(MOMENTS).get_shape()
    except SafetensorError as error:
        raise ValueError(f"{path} is no shard of latents: {error}") from error
    if shape != expected:
        raise ValueError(f"{path} holds moments of shape {shape} where {INDEX} says {expected}")


def check_latents(folder: str | Path, report: Report | None = None) -> Index:
    """Read every shard and compare it with its hash.

    Args:
        folder: made by lamamba encode.
        report: called with the progress of "verifying", in shards.

    Raises:
        FileNotFoundError, ValueError: naming what is missing or damaged.
    """
    folder = Path(folder)
    index = Index.load(folder)
    for done, shard in enumerate(index.shards, 1):
        check_shard(folder, index.plan, shard)
        if report:
            report(Progress("verifying", done, len(index.shards), "shards"))
    return index


class LatentSet:
    """Latents of lamamba encode, read by memory map: each read draws anew from the posterior of the image.

        x0 = (mean + std * noise - shift) * scale

    Args:
        folder: made by lamamba encode.
        mirror: read the mirror image's latents where the draws say so.
        image_size: what training expects; a folder made for another is refused.
        autoencoder: what training expects, by name or loaded; a folder made with another is refused. Samples are
            decoded with this one, wherever the one that encoded has gone.

    Raises:
        FileNotFoundError: when the folder holds no latents.
        ValueError: naming both sides, when it was made for another size or with another autoencoder; naming the shard
            that is missing or truncated.
    """

    def __init__(
        self, folder: str | Path, *, mirror: bool = False, image_size: int | None = None,
        autoencoder: Autoencoder | str | None = None,
    ):
        self._folder, self._mirror = Path(folder), mirror
        index = Index.load(self._folder)
        plan = index.plan
        if autoencoder is not None and not isinstance(autoencoder, Autoencoder):
            autoencoder = Autoencoder(autoencoder)
        self._check_fits(plan, image_size, autoencoder)
        for shard in index.shards:
            check_size(self._folder, shard)
        self.plan, self.name, self.codec = plan, str(folder), plan.codec
        if autoencoder is not None:
            self.codec = dataclasses.replace(plan.codec, autoencoder=autoencoder.name)
        self.label_names, self.image_size = plan.label_names, plan.image_size
        self.channels, self.input_size = plan.shape[0], plan.shape[1]
        self.draws_latents = plan.parts == 2
        self.fingerprint = index.fingerprint
        self._shards = [shard.file for shard in index.shards]
        self._starts = np.cumsum([0, *(len(shard.labels) for shard in index.shards)])
        self._labels = np.concatenate([np.array(shard.labels, dtype=np.int64) for shard in index.shards])
        self._maps: dict[int, np.ndarray] = {}

    def _check_fits(self, plan: Plan, image_size: int | None, autoencoder: Autoencoder | None) -> None:
        if image_size is not None and image_size != plan.image_size:
            raise ValueError(
                f"{self._folder} holds latents of images of {plan.image_size} x {plan.image_size} pixels, this "
                f"training wants {image_size} x {image_size}; set data.image_size={plan.image_size}, or encode anew"
            )
        if autoencoder is not None and autoencoder.sha256 != plan.codec.autoencoder_sha256:
            raise ValueError(
                f"{self._folder} was made with the autoencoder {plan.codec.autoencoder} "
                f"({str(plan.codec.autoencoder_sha256)[:12]}), this training wants {autoencoder.name} "
                f"({autoencoder.sha256[:12]}): weights or configurations differ. Name the first one, or encode anew"
            )
        if self._mirror and plan.views == 1:
            raise ValueError(
                f"{self._folder} was made without mirror images; encode with mirror, or set data.mirror=false"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def _map(self, number: int) -> np.ndarray:
        """Memory map of a shard's moments (n, views, parts, c, h, w)."""
        if number not in self._maps:
            path = self._folder / self._shards[number]
            try:
                self._maps[number] = load_file(path)[MOMENTS].numpy()           # safetensors maps the file
            except (SafetensorError, OSError, KeyError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); lamamba data check {self._folder} tells more"
                ) from error
        return self._maps[number]

    def moments(self, indices: Sequence[int] | np.ndarray, mirror: np.ndarray | None = None) -> Tensor:
        """Moments (b, parts, c, h, w) as stored, of images or, where mirror (b,) bool is true, their mirror images."""
        chosen = np.asarray(indices, dtype=np.int64)
        numbers = np.searchsorted(self._starts, chosen, side="right") - 1
        rows, plan = chosen - self._starts[numbers], self.plan
        views = np.zeros(len(chosen), dtype=np.int64) if mirror is None else mirror.astype(np.int64)
        out = np.empty((len(chosen), plan.parts, *plan.shape), dtype=plan.storage)
        for k, (number, row, view) in enumerate(zip(numbers.tolist(), rows.tolist(), views.tolist(), strict=True)):
            out[k] = self._map(number)[row, view]
        return torch.from_numpy(out)

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """x0 (b, c, h, w) float32, drawn from the posteriors, and labels (b,) int64."""
        moments = self.moments(indices, draws.mirror if self._mirror else None)
        latents = moments[:, 0].float()
        if self.plan.parts == 2:
            assert draws.latent is not None
            latents = latents.addcmul_(moments[:, 1].float(), draws.latent)
        return self.codec.to_x0(latents), torch.from_numpy(self._labels[np.asarray(indices)])

    def files(self, indices: Sequence[int]) -> list[str]:
        """File names of images; the index is read for them at each call."""
        shards = Index.load(self._folder).shards
        numbers = np.searchsorted(self._starts, np.asarray(indices), side="right") - 1
        return [shards[n].files[index - self._starts[n]] for n, index in zip(numbers, indices, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}
