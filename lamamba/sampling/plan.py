"""Which images a folder shall hold: a value that decides every one of them, and the folder's own description."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lamamba.config import unknown_name
from lamamba.sampling.labels import LabelRule, label_of
from lamamba.sampling.settings import MAX_SEED, ImageMetadata, Settings
from lamamba.utils.files import differences_in_words, read_json
from lamamba.utils.shards import PLAN

SAMPLES_VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards.json"
NPZ = "samples.npz"
UNFINISHED = ".sampling"
"""Folder that holds the plan and what is done, until all images are there."""

FileKind = Literal["png", "npz", "both"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides the images. Two processes with the same plan on the same kind of machine write the same bytes.

    Raises:
        ValueError: when numbers do not fit.
    """

    settings: Settings
    num: int
    """Images."""
    seed: int
    """Of image 0; image k has seed + k."""
    rule: LabelRule
    """See lamamba/sampling/labels.py."""
    classes: tuple[int, ...] = ()
    """To choose from."""
    files: FileKind = "png"
    batch_size: int = 64
    """Images that the network sees at once, and in a shard. Another number rounds otherwise: one grey level."""
    threads: int = 0
    """On a CPU, cores for each process; 0 on others. It may round otherwise, too."""
    channels: int = 3
    """Of the pictures."""

    def __post_init__(self) -> None:
        if self.files not in get_args(FileKind):
            raise unknown_name("kind of files", self.files, get_args(FileKind))
        for name, low in {"num": 1, "batch_size": 1, "seed": 0, "threads": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if self.seed + self.num - 1 > MAX_SEED:
            raise ValueError(f"seed {self.seed} + {self.num} images goes beyond the largest seed, {MAX_SEED}")
        if (self.rule == "none") != (not self.classes):
            raise ValueError("a rule for labels needs classes to choose from, and classes need a rule")

    @property
    def num_shards(self) -> int:
        return -(-self.num // self.batch_size)

    def shard_range(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.num))

    def seed_of(self, k: int) -> int:
        return self.seed + k

    def label_of(self, k: int) -> int | None:
        return None if self.rule == "none" else label_of(self.rule, k, self.seed_of(k), self.classes)

    def labels_of(self, images: range) -> list[int] | None:
        """One per image; None for an unconditional model."""
        return None if self.rule == "none" else [label for k in images if (label := self.label_of(k)) is not None]

    def file_of(self, k: int) -> str:
        """An image's PNG."""
        return f"{k:0{max(6, len(str(self.num - 1)))}d}.png"

    def facts_of(self, k: int) -> ImageMetadata:
        """What the PNG of an image says of it."""
        label = self.label_of(k)
        return ImageMetadata(
            settings=self.settings, seeds=(self.seed_of(k),), labels=None if label is None else (label,),
            batch_size=self.batch_size,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.settings.height, self.settings.width, self.channels

    @property
    def npz_bytes(self) -> int:
        """About the size of all images in one file."""
        return self.num * self.settings.height * self.settings.width * 3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {**values, "settings": self.settings.to_dict(), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Undo `to_dict`.

        Raises:
            ValueError: for entries that are missing or unknown.
        """
        try:
            settings = Settings.from_dict(values["settings"])
            return cls(**{**values, "settings": settings, "classes": tuple(values["classes"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan is damaged or of another version: {error}") from error

    def differences(self, other: Plan) -> list[str]:
        """Where two plans would give different images or files, one phrase per entry."""
        return differences_in_words(self._what_counts(), other._what_counts())

    def _what_counts(self) -> dict[str, Any]:
        values = self.to_dict()
        del values["settings"]
        return {**self.settings.what_counts(), **values}


def find_plan(folder: str | Path) -> Plan | None:
    """The plan by which a folder was made or begun; None where there is none.

    Raises:
        ValueError: when it is damaged.
    """
    folder = Path(folder)
    for path in (folder / MANIFEST, folder / UNFINISHED / PLAN):
        if path.is_file():
            return Plan.from_dict(read_json(path, SAMPLES_VERSION).get("plan", {}))
    return None
