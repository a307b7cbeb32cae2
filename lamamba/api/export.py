"""lamamba.export: a trained network as a diffusers pipeline in one folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from lamamba.exporting.onnx import require_onnx
from lamamba.exporting.pipeline_folder import write_pipeline_folder
from lamamba.options.base import verb
from lamamba.options.export import ExportOptions
from lamamba.runs.model import model_folder, open_model
from lamamba.utils.files import check_folder
from lamamba.utils.progress import ProgressOption, reporting


@dataclass(frozen=True)
class ExportResult:
    """A pipeline folder."""

    path: Path
    num_bytes: int
    """Of all its files."""
    grid: Image.Image | None = field(repr=False)
    """The samples of the model card; None where none were made."""
    onnx_error: float | None
    """max |onnx - torch| / max |torch|; None without ONNX."""

    def __str__(self) -> str:
        return (
            f"{self.path}: a diffusers pipeline, {self.num_bytes / 1e6:.1f} MB; "
            f"LaMambaPipeline.from_pretrained(\"{self.path}\")"
        )

    def _repr_png_(self) -> bytes | None:
        return self.grid._repr_png_() if self.grid else None


@verb
def export(options: ExportOptions, *, progress: ProgressOption = "auto") -> ExportResult:
    """Make a diffusers pipeline of a trained network: weights, scheduler, autoencoder, label names, a model card.

    The folder loads with LaMambaPipeline.from_pretrained and with `lamamba.sample`. It is written whole or not at all.

    Raises:
        FileExistsError: when the target exists.
        FileNotFoundError: when there is no such model.
        ValueError: when the options do not fit the model, or its files are damaged.
        RuntimeError: when ONNX is requested and its packages are not installed.
    """
    target = options.target
    check_folder(target, is_new=True)
    if options.onnx:
        require_onnx()
    options = replace(options, source=model_folder(options.source))             # a running training writes newer ones
    model = open_model(options.source, ema=options.ema, autoencoder=options.autoencoder)
    with reporting(progress) as report:
        grid, onnx_error = write_pipeline_folder(options, model, report)
    num_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return ExportResult(target, num_bytes, grid, onnx_error)
