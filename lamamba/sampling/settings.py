"""Settings of images: written into every PNG, and compared before a folder of images is continued."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lamamba._version import __version__
from lamamba.config import check_known
from lamamba.diffusion.guidance import Guidance
from lamamba.models.deep_cache import LaMambaCacheConfig
from lamamba.options.base import Positive, Quantization, from_dict, record
from lamamba.utils.files import parse_json

SETTINGS_VERSION = 1
PNG_KEY = "lamamba"
"""Of the text in a PNG that holds the settings as JSON."""
DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1


class Interpolated(NamedTuple):
    """Between two seeds or two classes: weight 0 is the first, 1 the second. In JSON a list of the three."""

    first: int
    second: int
    weight: float


@record
class Settings:
    """All that makes a picture of a seed and a label."""

    model: str
    """As it was named: a folder."""
    model_sha256: str
    """By `fingerprint`."""
    sampler: str
    steps: Positive
    height: Positive
    """Of the picture, in pixels."""
    width: Positive
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
    quantized: Quantization | None = None
    """Weights (and activations) in eight bits; absent in files where they were not."""
    lora: str | None = None
    """As it was named; absent, as the next two, in files of pictures without."""
    lora_sha256: str | None = None
    """Of its file."""
    cache: LaMambaCacheConfig | None = None
    """How deep features were kept between steps."""

    def __post_init__(self) -> None:
        check_known("dtype", self.dtype, DTYPES)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        values["guidance"]["interval"] = list(self.guidance.interval)
        younger = ("cache", "quantized", "lora", "lora_sha256")
        return {key: value for key, value in values.items() if value is not None or key not in younger}

    def what_counts(self) -> dict[str, Any]:
        """Flat, and without the names of folders: their hashes say what was in them."""
        values = self.to_dict()
        guidance = values.pop("guidance")
        values |= {f"cache {key}": value for key, value in values.pop("cache", {}).items()}
        names = ("model", "autoguidance", "autoencoder", "lora")
        return {key: v for key, v in values.items() if key not in names} | {
            f"guidance {key}": value for key, value in guidance.items()
        }


@record
class ImageMetadata:
    """What is in one PNG: settings, and the seed and label of each image on it.

    Raises:
        ValueError: when seeds, labels and columns do not fit together.
    """

    settings: Settings
    seeds: tuple[int | Interpolated, ...]
    labels: tuple[int | Interpolated, ...] | None
    """None for an unconditional model."""
    columns: int = 0
    """Of the table; 0 where the PNG is a single image as the model made it."""
    row_names: tuple[str, ...] = ()
    batch_size: Positive = 64
    lamamba: str = __version__

    def __post_init__(self) -> None:
        count = len(self.seeds)
        if not count or (self.labels is not None and len(self.labels) != count) or not 0 <= self.columns <= count:
            raise ValueError("seeds, labels and columns do not fit together")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the format's version."""
        return {"version": SETTINGS_VERSION, **vars(self), "settings": self.settings.to_dict()}

    @classmethod
    def from_dict(cls, values: Any) -> ImageMetadata:
        """Undo `to_dict`.

        Raises:
            ValueError: for values of a newer format, or damaged ones.
        """
        values = dict(values) if isinstance(values, dict) else {}
        version = values.pop("version", None)
        if type(version) is not int or not 1 <= version <= SETTINGS_VERSION:
            raise ValueError(f"settings of version {version}, this lamamba reads up to {SETTINGS_VERSION}: upgrade it")
        return from_dict(cls, values)


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
    except PermissionError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise ValueError(
            f"{path} holds no settings: it was not made by lamamba, or a program that does not keep a PNG's text "
            "saved it again"
        )
    try:
        return ImageMetadata.from_dict(parse_json(text))
    except ValueError as error:
        raise ValueError(f"the settings in {path} cannot be read: {error}") from error
