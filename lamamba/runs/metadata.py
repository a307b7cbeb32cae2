"""Metadata of a trained network (sampling.json): what sampling needs besides the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lamamba.config import LATENT_SCALE, Objective, UNetConfig
from lamamba.data.codec import CodecConfig
from lamamba.options.base import Positive, read_record, record
from lamamba.utils.files import attribute_differences, write_json

SD_VAE_CHANNELS, SD_VAE_SCALE = 4, 0.18215
"""Of the latents of Stable Diffusion's autoencoder, on which the official models are trained: x0 = latents * scale."""
SAMPLING_VERSION = 3
"""Of sampling.json. 1: of an autoencoder, the scale alone. 2: no guidance scale."""


@record
class ModelMetadata(CodecConfig):
    """What a sampler must know of a trained network besides its weights; saved with them as sampling.json."""

    objective: Objective
    """What the network predicts, and so which samplers fit."""
    image_size: Positive
    """Side of the images in pixels."""
    label_names: tuple[str, ...] = ()
    """One name per class."""
    guidance: float | None = None
    """The guidance scale of its recipe; None: see `default_guidance`."""
    version: int = SAMPLING_VERSION

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> ModelMetadata:
        """Read sampling.json.

        Raises:
            ValueError: when it is damaged or of a newer format.
        """
        return read_record(cls, path, SAMPLING_VERSION)

    def check_fits(self, config: UNetConfig, where: str | Path) -> None:
        """Check that this is the metadata of a network of this configuration.

        Raises:
            ValueError: naming the file and the entry that does not fit.
        """
        side, names, channels = config.input_size[0], len(self.label_names), len(self.latents_mean)
        if self.objective != config.objective:
            raise ValueError(f"{where}: objective={self.objective!r}, and the network's is {config.objective!r}")
        if names not in (0, config.num_classes):
            raise ValueError(f"{where}: label_names has {names} names, and the network {config.num_classes} classes")
        if self.image_size % side or (self.codec == "pixels" and self.image_size != side):
            raise ValueError(f"{where}: image_size={self.image_size} does not fit the network's input, {side} a side")
        if channels not in (0, config.in_channels):
            raise ValueError(f"{where}: latents_mean has {channels} numbers for {config.in_channels} channels")


def check_same_data(
    name: str, metadata: ModelMetadata, other: str, label_names: tuple[str, ...], codec: CodecConfig
) -> None:
    """Check that a model was trained on data like this; names of classes that one does not have are not compared.

    Raises:
        ValueError: when names or order of the classes, or kind or scale of the latents, differ.
    """
    found = []
    if metadata.label_names and label_names and metadata.label_names != tuple(label_names):
        pairs = zip(metadata.label_names, label_names, strict=False)
        there, here = next((pair for pair in pairs if pair[0] != pair[1]), (f"{len(metadata.label_names)} classes",
                                                                            f"{len(label_names)} classes"))
        found.append(f"classes: {there!r} there, {here!r} here")
    found += attribute_differences(metadata, codec, ("codec", "scale", "shift"))
    if found:
        raise ValueError(f"{name} was trained on other data than {other} ({'; '.join(found)})")


def default_guidance(saved: float | None, can_guide: int | bool) -> float:
    """The guidance scale where none is given: the one saved with the model, else 2; 1 where nothing can guide.

    Args:
        saved: of the model's metadata.
        can_guide: whether there are classes (their number), or a guiding model.
    """
    if not can_guide:
        return 1.0
    return 2.0 if saved is None else saved


def assumed_metadata(config: UNetConfig) -> ModelMetadata:
    """Metadata of a network that comes without: an official checkpoint, a folder of `LaMambaUNet.save_pretrained`.

    Four channels are taken for latents of Stable Diffusion's autoencoder, any other number for pixels.
    """
    is_latent = config.in_channels == SD_VAE_CHANNELS
    return ModelMetadata(
        objective=config.objective, image_size=config.input_size[0] * (LATENT_SCALE if is_latent else 1),
        codec="latents" if is_latent else "pixels", scale=SD_VAE_SCALE if is_latent else 1.0,
        guidance=config.lowest_guidance if config.objective == "flow-map" and config.num_classes else None,
    )
