"""Settings of images: written into every PNG, and compared before a folder of images is continued."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lamamba._version import __version__
from lamamba.config import unknown_name
from lamamba.diffusion.guidance import Guidance

SETTINGS_VERSION = 1
PNG_KEY = "lamamba"
"""Of the text in a PNG that holds the settings as JSON."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Interpolated:
    """Between two seeds or two classes: weight 0 is the first, 1 the second."""

    first: int
    second: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that makes a picture of a seed and a label."""

    model: str
    """As it was named: a folder."""
    model_sha256: str
    """By `fingerprint`."""
    sampler: str
    steps: int
    height: int
    """Of the picture, in pixels."""
    width: int
    guidance: Guidance = field(default_factory=Guidance)
    autoguidance: str | None = None
    """The guiding model, as it was named."""
    autoguidance_sha256: str | None = None
    autoencoder: str | None = None
    """Of models of latents, as it was named."""
    autoencoder_sha256: str | None = None
    dtype: str = "float32"
    """In which the network computed."""
    compiled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        values["guidance"]["interval"] = list(self.guidance.interval)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Undo `to_dict`.

        Raises:
            ValueError: for entries that are missing or unknown.
        """
        names = [entry.name for entry in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise unknown_name("setting", key, names)
        try:
            return cls(**{**values, "guidance": Guidance(**values.get("guidance", {}))})
        except TypeError as error:
            raise ValueError(f"settings are incomplete: {error}") from error

    def what_counts(self) -> dict[str, Any]:
        """Flat, and without the names of folders: their hashes say what was in them."""
        values = self.to_dict()
        guidance = values.pop("guidance")
        names = ("model", "autoguidance", "autoencoder")
        return {key: v for key, v in values.items() if key not in names} | {
            f"guidance {key}": value for key, value in guidance.items()
        }


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """What is in one PNG: settings, and the seed and label of each image on it."""

    settings: Settings
    seeds: tuple[int | Interpolated, ...]
    labels: tuple[int | Interpolated, ...] | None
    """None for an unconditional model."""
    columns: int = 0
    """Of the table; 0 where the PNG is a single image as the model made it."""
    row_names: tuple[str, ...] = ()
    batch_size: int = 64
    lamamba: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the format's version."""
        return {
            "version": SETTINGS_VERSION, "settings": self.settings.to_dict(), "seeds": _plain(self.seeds),
            "labels": None if self.labels is None else _plain(self.labels), "columns": self.columns,
            "row_names": list(self.row_names), "batch_size": self.batch_size, "lamamba": self.lamamba,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageMetadata:
        """Undo `to_dict`.

        Raises:
            ValueError: for values of a newer format, or damaged ones.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if not isinstance(version, int) or version > SETTINGS_VERSION:
            raise ValueError(f"settings of version {version}, this lamamba reads up to {SETTINGS_VERSION}: upgrade it")
        try:
            metadata = cls(
                settings=Settings.from_dict(values["settings"]), seeds=_rich(values["seeds"]),
                labels=None if values["labels"] is None else _rich(values["labels"]), columns=int(values["columns"]),
                row_names=tuple(values["row_names"]), batch_size=int(values["batch_size"]), lamamba=values["lamamba"],
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"settings are damaged: {error!r}") from error
        count = len(metadata.seeds)
        if not count or (
            metadata.labels is not None and len(metadata.labels) != count
        ) or not 0 <= metadata.columns <= count:
            raise ValueError("settings are damaged: seeds, labels and columns do not fit together")
        return metadata


def _plain(values: Sequence[int | Interpolated]) -> list[int | list[float]]:
    return [[p.first, p.second, p.weight] if isinstance(p, Interpolated) else int(p) for p in values]


def _rich(values: Sequence[int | Sequence[float]]) -> tuple[int | Interpolated, ...]:
    return tuple(p if isinstance(p, int) else Interpolated(int(p[0]), int(p[1]), float(p[2])) for p in values)


def png_text(metadata: ImageMetadata) -> PngImagePlugin.PngInfo:
    """What Pillow writes into a PNG with `save(..., pnginfo=...)`."""
    text = PngImagePlugin.PngInfo()
    text.add_text(PNG_KEY, json.dumps(metadata.to_dict(), separators=(",", ":")))
    return text


def read_image_metadata(path: str | Path) -> ImageMetadata:
    """The settings in a PNG.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no PNG, holds no settings, or they cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give a PNG made by lamamba")
    try:
        with Image.open(path) as picture:
            picture.load()                                                      # text may come after the pixels
            text = getattr(picture, "text", {}).get(PNG_KEY)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise ValueError(
            f"{path} holds no settings: it was not made by lamamba, or a program that does not keep a PNG's text "
            "saved it again"
        )
    try:
        return ImageMetadata.from_dict(json.loads(text))
    except ValueError as error:
        raise ValueError(f"the settings in {path} cannot be read: {error}") from error
