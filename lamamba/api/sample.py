"""lamamba.sample: images on one picture, or in a film."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from lamamba.diffusion.denoise import make_scheduler
from lamamba.options.base import verb
from lamamba.options.sampling import SampleOptions
from lamamba.sampling.generate import DEFAULT_BATCH_SIZE
from lamamba.sampling.prepare import PreparedModel, fill_from_picture, prepare
from lamamba.sampling.settings import ImageMetadata, Interpolated, png_text
from lamamba.sampling.table import Table, describe_seeds, make_table
from lamamba.utils.distributed import pick_device
from lamamba.utils.files import check_target
from lamamba.utils.progress import Progress, ProgressOption, reporting
from lamamba.utils.text import counted
from lamamba.viz.films import FILM_SUFFIXES, check_film, chosen_frames, save_film
from lamamba.viz.grids import bare_picture, grid_picture, save_picture


@dataclass(frozen=True)
class SampleResult:
    """Sampled images, and what repeats them."""

    images: np.ndarray = field(repr=False)
    """(n, h, w, c) uint8."""
    path: Path | None
    """The file, where one was written."""
    metadata: ImageMetadata
    """Settings, seeds and labels, as in the PNG."""
    num_frames: int = 0
    """Of a film; 0 for a picture."""

    @property
    def seeds(self) -> tuple[int | Interpolated, ...]:
        """One per image."""
        return self.metadata.seeds

    @property
    def labels(self) -> tuple[int | Interpolated, ...] | None:
        """One per image; None of an unconditional model."""
        return self.metadata.labels

    @property
    def picture(self) -> Image.Image:
        """All images in a table; a single image without one as it is."""
        metadata = self.metadata
        if metadata.columns:
            return grid_picture(self.images, metadata.columns, metadata.row_names)
        return bare_picture(self.images[0])

    def __str__(self) -> str:
        settings = self.metadata.settings
        name = "" if self.path is None else f"{self.path}: "
        if self.num_frames:
            return f"{name}a film of {self.num_frames} pictures"
        how = f"{settings.sampler} in {counted(settings.steps, 'step')}, guidance {settings.guidance.scale:g}"
        how += f", LoRA {settings.lora}" if settings.lora else ""
        how += f", {settings.quantized}" if settings.quantized else ""
        how += f", cache {settings.cache.interval}" if settings.cache else ""
        return f"{name}{counted(len(self.images), 'image')}, {describe_seeds(self.seeds)}, {how}"

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.picture.save(png, format="PNG", pnginfo=png_text(self.metadata))
        return png.getvalue()


@verb
def sample(options: SampleOptions, *, progress: ProgressOption = "auto") -> SampleResult:
    """Sample images from a trained model; with `options.out` into a PNG that carries its settings, or into a film.

        result = lamamba.sample(SampleOptions(model="runs/digits", classes=[3, 7], num=4))
        result.images                                       # (8, 8, 8, 1) uint8

    A film (.gif, .mp4) shows the denoising, or the interpolation where there is one. Image k depends on seed k alone.

    Raises:
        FileNotFoundError: when there is no such model or picture.
        ValueError: when options do not fit the model or each other, or the picture's model has changed.
        RuntimeError: when a film or a compiler needs something that is not installed.
    """
    out = options.out
    is_film = out is not None and out.suffix.lower() in FILM_SUFFIXES
    if out is not None:
        check_target(out)
        if is_film:
            check_film(out)
    options, picture = fill_from_picture(options)
    device = pick_device(options.device)
    prepared = prepare(options, picture, device)
    table = make_table(options, picture, prepared.model)
    metadata = ImageMetadata(
        settings=prepared.settings, batch_size=options.batch_size or DEFAULT_BATCH_SIZE, **vars(table)
    )
    film = _DenoisingFilm(prepared) if is_film and options.interpolate is None else None
    labels = {label for label in metadata.labels or () if isinstance(label, int)}
    with reporting(progress) as report:
        generator = prepared.generator(device, metadata.batch_size, labels, num_images=len(metadata.seeds))
        images = generator(
            metadata.labels, metadata.seeds, preview=film,
            on_step=lambda done, total: report(Progress("sampling", done, total, "steps")),
        )
    result = SampleResult(images, out, metadata)
    if out is None:
        return result
    if not is_film:
        save_picture(result.picture, out, png_text(metadata))
        return result
    frames = _interpolation_frames(images, table) if film is None else film.frames(table)
    save_film(frames, out, options.fps)
    return replace(result, num_frames=len(frames))


class _DenoisingFilm:
    """A preview callback that keeps x0 as predicted in some of the steps."""

    def __init__(self, prepared: PreparedModel):
        settings, objective = prepared.settings, prepared.model.network.architecture.objective
        evaluations = len(make_scheduler(settings.sampler, objective, settings.steps).timesteps)
        self._decode = prepared.model.decode
        self._images: dict[int, list[np.ndarray]] = {step: [] for step in chosen_frames(evaluations)}

    def __call__(self, batch: range, step: int, x0: Tensor) -> None:
        if step in self._images:
            self._images[step].append(self._decode(x0))

    def frames(self, table: Table) -> list[Image.Image]:
        """A table of all images for each step."""
        return [
            grid_picture(np.concatenate(batches), table.columns or 1, table.row_names)
            for batches in self._images.values()
        ]


def _interpolation_frames(images: np.ndarray, table: Table) -> list[Image.Image]:
    """A picture for each column, with the table's rows."""
    columns = images.reshape(-1, table.columns, *images.shape[1:]).swapaxes(0, 1)
    return [grid_picture(column, 1, table.row_names) for column in columns]
