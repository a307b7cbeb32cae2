"""The data that a run's configuration names; what a recipe says of it, where it is not there yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamamba.config import LATENT_SCALE
from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig
from lamamba.data.digits import Digits
from lamamba.data.image_files import is_junk
from lamamba.data.images import Images
from lamamba.data.latents import LatentSet, is_latents
from lamamba.data.manifest import excluded_files
from lamamba.data.sets import EncodedSet, PixelSet, TrainingSet
from lamamba.data.sources import FolderSource, open_source
from lamamba.options.training import DataOptions, TrainConfig
from lamamba.runs.folder import RunFolder
from lamamba.utils.distributed import is_rank_zero, local_device

logger = logging.getLogger("lamamba.training")

LATENT_CHANNELS = 4
"""Of the Stable Diffusion autoencoders, whose latents the paper's recipes train on."""


def open_data(config: TrainConfig, out: Path | None = None) -> TrainingSet:
    """The data that a configuration names: pixels, latents, or images that are encoded as they are read.

    Args:
        config: of the run.
        out: the run's folder, for the files excluded when the run began, and to write unforeseen bad images down.

    Raises:
        OSError, ValueError: when it is missing or does not fit.
    """
    data = config.data
    if data.source == "digits":
        if data.channels != 1:
            raise ValueError("data.channels=3 does not fit the digits, which are grey; use 1")
        if data.kind == "latents" or data.autoencoder is not None:
            given = "data.autoencoder" if data.autoencoder is not None else "data.kind='latents'"
            raise ValueError(f"{given} does not fit the digits, which are pixels: name the data as data.source")
        return PixelSet(Digits(data.image_size), data.mirror)
    if data.kind == "latents" or is_latents(data.source):
        if data.kind == "images":
            raise ValueError(f"{data.source} holds latents, and data.kind='images'; leave data.kind out")
        if data.crop != "centre":
            raise ValueError(f"data.crop={data.crop!r} does not fit {data.source}: its latents are of centre crops")
        return LatentSet(data.source, mirror=data.mirror, image_size=data.image_size, autoencoder=data.autoencoder)
    images = _open_images(data, None if out is None else RunFolder(out))
    if data.autoencoder is None:
        return PixelSet(images, data.mirror)
    return EncodedSet(images, Autoencoder(data.autoencoder, local_device(config.device)), data.mirror)


def _open_images(data: DataOptions, run: RunFolder | None) -> Images:
    """Images without the excluded files: those of the manifest, or those excluded since the run began."""
    source = open_source(data.source, () if run is None else run.data_files())
    if run is not None and isinstance(source, FolderSource):
        _check_outside(run, Path(data.source))
    excluded, note = excluded_files(source, data.manifest)
    newly_excluded: set[str] = set()
    if run is not None and (at_the_start := run.excluded()) is not None:
        excluded, newly_excluded = at_the_start, set(excluded) - set(at_the_start)
    if note and is_rank_zero():
        logger.warning(note)
    if newly_excluded and is_rank_zero():
        logger.info(
            f"{len(newly_excluded)} files that the manifest names now were not known to be bad when this run began: "
            "its order stays, and where they cannot be read the next good ones replace them"
        )
    return Images(
        source, data.image_size, data.channels, crop=data.crop, excluded=excluded, newly_excluded=newly_excluded,
        max_bad_images=data.max_bad_images, bad_files=None if run is None else run.bad_images,
    )


def _check_outside(run: RunFolder, images: Path) -> None:
    """Check that a run which begins is not in the folder of its images, of which its sample grids would be some.

    Raises:
        ValueError: when it is.
    """
    place, images = run.path.resolve(), images.resolve()
    if place.is_relative_to(images) and not is_junk(place.relative_to(images).as_posix()) and not run.names():
        raise ValueError(
            f"{run.path} lies in the folder of the images, and its sample grids would be images of the data: give a "
            "folder elsewhere as out"
        )


def plan_data(config: TrainConfig, out: Path | None = None) -> TrainingSet:
    """The data for a plan; where it is not there yet, what the recipe says of it.

    Args: as `open_data`.

    Raises:
        OSError, ValueError: when the data does not fit, or is missing and the recipe does not say what it would be.
    """
    data = config.data
    if data.expected_images is None or data.source == "digits" or Path(data.source).exists():
        return open_data(config, out)
    return PlannedData(data)


class PlannedData:
    """A training set that is not there: its number of images and the shapes, by a recipe."""

    def __init__(self, data: DataOptions):
        is_latent = data.kind == "latents" or data.autoencoder is not None
        self.name = f"{data.source} (not read; as the recipe says)"
        self.image_size = data.image_size
        self.input_size = data.image_size // LATENT_SCALE if is_latent else data.image_size
        self.channels = LATENT_CHANNELS if is_latent else data.channels
        self.codec, self.draws_latents = CodecConfig(codec="latents" if is_latent else "pixels"), is_latent
        self.label_names = tuple(str(label) for label in range(data.expected_classes or 0))
        self.fingerprint = ""
        self._count = data.expected_images or 0

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int], draws: Any) -> Any:
        raise ValueError(f"{self.name} cannot be trained on")

    def files(self, indices: Sequence[int]) -> list[str]:
        raise ValueError(f"{self.name} has no files")
