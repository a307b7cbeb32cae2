"""The plan of a folder of images: all that decides every one of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from lamamba.options.base import Ge, Positive, from_dict, record
from lamamba.sampling.labels import LabelRule, label_of
from lamamba.sampling.settings import MAX_SEED, ImageMetadata, Settings
from lamamba.utils.files import read_json
from lamamba.utils.shards import PLAN, ShardPlan

SAMPLES_VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards.json"
NPZ = "samples.npz"
UNFINISHED = ".sampling"
"""Folder of unfinished work in it (lamamba/utils/shards.py)."""

FileKind = Literal["png", "npz", "both"]


@record
class Plan(ShardPlan):
    """All that decides the images: equal plans on the same kind of machine give the same bytes.

    Raises:
        ValueError: when numbers do not fit.
    """

    settings: Settings
    num: Positive
    """Number of images."""
    seed: Annotated[int, Ge(0)]
    """Seed of image 0; image k has seed + k."""
    rule: LabelRule
    """See lamamba/sampling/labels.py."""
    classes: tuple[int, ...] = ()
    """Classes that the rule chooses from."""
    files: FileKind = "png"
    batch_size: Positive = 64
    """Images per batch of the network and per shard. Another number rounds otherwise: one grey level."""
    threads: Annotated[int, Ge(0)] = 0
    """On a CPU, cores of each process (another number may round otherwise, too); 0 on other devices."""
    channels: int = 3
    """Of the images: 1 or 3."""

    def __post_init__(self) -> None:
        if self.seed + self.num - 1 > MAX_SEED:
            raise ValueError(f"seed {self.seed} + {self.num} images goes beyond the largest seed, {MAX_SEED}")
        if (self.rule == "none") != (not self.classes):
            raise ValueError("a rule for labels needs classes to choose from, and classes need a rule")

    @property
    def sizes(self) -> tuple[int, int]:
        return self.num, self.batch_size

    def seed_of(self, k: int) -> int:
        return self.seed + k

    def labels_of(self, images: Iterable[int]) -> list[int] | None:
        """One per image; None for an unconditional model."""
        if self.rule == "none":
            return None
        return [label_of(self.rule, k, self.seed_of(k), self.classes) for k in images]

    def file_of(self, k: int) -> str:
        """An image's PNG."""
        return f"{k:0{max(6, len(str(self.num - 1)))}d}.png"

    def metadata_of(self, k: int) -> ImageMetadata:
        """The settings that an image's PNG carries."""
        labels = self.labels_of([k])
        return ImageMetadata(
            settings=self.settings, seeds=(self.seed_of(k),), labels=tuple(labels) if labels else None,
            batch_size=self.batch_size,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one image."""
        return self.settings.height, self.settings.width, self.channels

    @property
    def npz_bytes(self) -> int:
        """Size of all images in one npz file, but for headers and labels."""
        return self.num * self.settings.height * self.settings.width * 3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "settings": self.settings.to_dict(), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: Any, where: str | Path = "") -> Plan:
        return from_dict(cls, values, where)

    def compared(self) -> dict[str, Any]:
        values = self.to_dict()
        del values["settings"]
        return {**self.settings.what_counts(), **values}


def find_plan(folder: str | Path) -> Plan | None:
    """The plan by which a folder was made or begun; None where there is none.

    Raises:
        FileExistsError: when the folder has a manifest of something else.
        ValueError: when it is damaged.
    """
    folder = Path(folder)
    for path in (folder / MANIFEST, folder / UNFINISHED / PLAN):
        if path.is_file():
            if "plan" not in read_json(path):
                raise FileExistsError(f"{path} is of something else than a folder of samples; give another folder")
            return Plan.from_dict(read_json(path, SAMPLES_VERSION).get("plan"), path)
    return None
