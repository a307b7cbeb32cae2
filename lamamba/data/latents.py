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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig
from lamamba.data.sets import SampleDraws
from lamamba.options.base import Ge, Lt, Positive, from_dict, record
from lamamba.utils.files import read_json, sha256
from lamamba.utils.progress import Progress, Report
from lamamba.utils.shards import ShardPlan
from lamamba.utils.tensors import read_header
from lamamba.utils.text import shown

LATENTS_VERSION = 1
INDEX = "index.json"
UNFINISHED = ".encoding"
"""Folder of unfinished work in it (lamamba/utils/shards.py)."""
MOMENTS = "moments"
STORAGE = {"float16": torch.float16, "float32": torch.float32}
_STORED = {"F16": "float16", "F32": "float32"}
"""By safetensors' names."""


def is_latents(folder: str | Path) -> bool:
    """Whether a folder was made by lamamba encode, finished or not."""
    return (Path(folder) / INDEX).is_file() or (Path(folder) / UNFINISHED).is_dir()


_JSON_NAMES = {"codec": "facts", "excluded": "left_out"}
"""Of fields that the files call otherwise."""
_FIELDS = {name: field for field, name in _JSON_NAMES.items()}


def _renamed(values: Any, names: Mapping[str, str]) -> Any:
    return {names.get(key, key): value for key, value in values.items()} if isinstance(values, Mapping) else values


@record
class Plan(ShardPlan):
    """All that decides what the shards hold: equal plans give the same bytes."""

    source: str
    """The images, as they were named."""
    source_fingerprint: str
    """Of their names, classes and order, and of the excluded files."""
    images: Positive
    """Without the files that were known to be bad."""
    image_size: Positive
    crop: str
    views: Literal[1, 2]
    """2: the image and its mirror image; 1: the image alone."""
    parts: Literal[1, 2]
    """2: mean and standard deviation; 1: an autoencoder without a posterior."""
    shape: tuple[Positive, Positive, Positive]
    """(c, h, w) of one latent."""
    storage: Literal["float16", "float32"]
    codec: CodecConfig
    """Autoencoder and scaling; "facts" in JSON."""
    compute: str
    """Data type in which the autoencoder worked."""
    batch_size: int
    """Images per batch of the autoencoder: another number would round otherwise."""
    threads: int
    """Of a process on a CPU: another number would round otherwise, too; 0 on GPUs."""
    shard_size: Positive
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
    def from_dict(cls, values: Any, where: str | Path = "") -> Plan:
        facts = values.get("facts") if isinstance(values, Mapping) else None
        for name in ("codec", "scale"):                                         # whose defaults are those of pixels
            if isinstance(facts, Mapping) and name not in facts:
                raise ValueError(f"{where}: facts.{name} is missing" if where else f"facts.{name} is missing")
        return from_dict(cls, _renamed(values, _FIELDS), where)

    def compared(self) -> dict[str, Any]:
        values = self.to_dict()
        codec = values.pop("facts")
        for counted_otherwise in ("source", "label_names", "left_out"):         # by the source's fingerprint
            values.pop(counted_otherwise, None)
        codec.pop("autoencoder")                                                # its hash counts, not its name
        return values | codec


@record
class Shard:
    """A finished shard."""

    file: str
    bytes: int
    sha256: str
    labels: tuple[Annotated[int, Ge(0), Lt(2**31)], ...]
    files: tuple[str, ...]
    excluded: dict[str, str]
    """Images that could not be decoded when the shard was made, and why; "left_out" in JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _renamed(vars(self), _JSON_NAMES)

    @classmethod
    def from_dict(cls, values: Any, where: str | Path = "") -> Shard:
        """Undo `to_dict`; see `Plan.from_dict`."""
        return from_dict(cls, _renamed(values, _FIELDS), where)

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.files) or Path(self.file).name != self.file:
            raise ValueError(f"{self.file} has {len(self.labels)} labels and {len(self.files)} files")


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def check_place(shard: Shard, plan: Plan, number: int) -> None:
    """Check that a shard's record is that of the shard of this number: it may have come into another's place.

    Raises:
        ValueError: when it is another's.
    """
    images = len(plan.shard_range(number))
    if shard.file != shard_name(number) or len(shard.files) + len(shard.excluded) != images:
        raise ValueError(
            f"shard {number} is {shard.file} with {len(shard.files)} images and {len(shard.excluded)} left out, and "
            f"not {shard_name(number)} with {images} in all"
        )


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
        shards = values.get("shards")
        if not isinstance(shards, list) or not shards:
            raise ValueError(f"{path}: shards={shown(shards)} must be a list of shards")
        index = cls(Plan.from_dict(values.get("plan"), path), tuple(Shard.from_dict(shard, path) for shard in shards))
        index._check(path)
        return index

    def _check(self, path: Path) -> None:
        count, classes = self.plan.num_shards, max(1, len(self.plan.label_names))
        if len(self.shards) != count:
            raise ValueError(f"{path}: shards has {len(self.shards)} entries, and its plan {count}: it is damaged")
        for number, shard in enumerate(self.shards):
            try:
                check_place(shard, self.plan, number)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if (highest := max(shard.labels, default=0)) >= classes:
                raise ValueError(f"{path}: labels of {shard.file} has {highest}, and label_names {classes} classes")

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
    check_shape(path, plan, shard)


def check_shape(path: Path, plan: Plan, shard: Shard) -> None:
    """Check that a shard holds moments as the index says, and nothing else.

    Raises:
        ValueError: naming the file when it does not.
    """
    expected = {MOMENTS: ((len(shard.labels), plan.views, plan.parts, *plan.shape), plan.storage)}
    try:
        found = {name: (header.shape, _STORED.get(header.dtype)) for name, header in read_header(path).items()}
    except ValueError as error:
        raise ValueError(f"{error}; lamamba data check {path.parent} tells more") from error
    if found != expected:
        raise ValueError(f"{path} holds {found} where {INDEX} says {expected}: it is no shard of this folder")


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
    """Latents of lamamba encode: each read draws anew from the posterior of the image.

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
        self._shards = index.shards
        self._starts = np.cumsum([0, *(len(shard.labels) for shard in index.shards)])
        self._labels = np.concatenate([np.array(shard.labels, dtype=np.int64) for shard in index.shards])
        self._starts_in_file: dict[int, int] = {}

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

    def _first_byte(self, number: int) -> int:
        """Where the moments (n, views, parts, c, h, w) of a shard begin: after the length of its header, and that."""
        if number not in self._starts_in_file:
            shard, path = self._shards[number], self._folder / self._shards[number].file
            check_shape(path, self.plan, shard)
            with path.open("rb") as file:
                self._starts_in_file[number] = 8 + int.from_bytes(file.read(8), "little")
        return self._starts_in_file[number]

    def _read(self, number: int, row: int, view: int) -> np.ndarray:
        """Moments (parts, c, h, w) of an image's view, by one short read: a map would end the process where a file is
        truncated meanwhile."""
        plan, path = self.plan, self._folder / self._shards[number].file
        shape, dtype = (plan.parts, *plan.shape), np.dtype(plan.storage)
        count = math.prod(shape)
        try:
            start = self._first_byte(number) + (row * plan.views + view) * count * dtype.itemsize
            found = np.fromfile(path, dtype, count, offset=start)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}). {_MEND}") from error
        if len(found) != count:
            raise ValueError(f"{path} ends before image {row}: it is truncated. {_MEND}")
        return found.reshape(shape)

    def _places(self, indices: Sequence[int] | np.ndarray) -> tuple[list[int], list[int]]:
        """Shards of images, and their rows in these."""
        chosen = np.asarray(indices, dtype=np.int64)
        numbers = np.searchsorted(self._starts, chosen, side="right") - 1
        return numbers.tolist(), (chosen - self._starts[numbers]).tolist()

    def moments(self, indices: Sequence[int] | np.ndarray, mirror: np.ndarray | None = None) -> Tensor:
        """Moments (b, parts, c, h, w) as stored, of images or, where mirror (b,) bool is true, their mirror images."""
        views = [0] * len(indices) if mirror is None else mirror.astype(np.int64).tolist()
        places = zip(*self._places(indices), views, strict=True)
        return torch.from_numpy(np.stack([self._read(*place) for place in places]))

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """x0 (b, c, h, w) float32, drawn from the posteriors, and labels (b,) int64."""
        moments = self.moments(indices, draws.mirror if self._mirror else None)
        latents = moments[:, 0].float()
        if self.plan.parts == 2:
            assert draws.latent is not None
            latents = latents.addcmul_(moments[:, 1].float(), draws.latent)
        return self.codec.to_x0(latents), torch.from_numpy(self._labels[np.asarray(indices)])

    def files(self, indices: Sequence[int]) -> list[str]:
        """File names of images."""
        numbers, rows = self._places(indices)
        return [self._shards[number].files[row] for number, row in zip(numbers, rows, strict=True)]

