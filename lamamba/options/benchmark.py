"""Options of `lamamba.benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from lamamba.options.base import FilePath, Ge, Positive, PositiveInts, Threads, Words, options


@options
class BenchmarkOptions:
    """What to time, and how."""

    models: Words = ("xl",)
    """Presets (s, b, l, xl), separated by commas; xl-n16 has 16 states."""
    peers: Words = ("dit-xl-2",)
    """adm-256, adm-512, adm-u-256, ldm-4, ldm-8, dit-{s,b,l,xl}-{2,4}, u-vit-h-2, u-vit-h-4, dis-h-2, dim-huge,
    separated by commas; "all" of them that are for an image size, or "none"."""
    image_sizes: PositiveInts = (256,)
    """Sides of the images in pixels, separated by commas."""
    batch: PositiveInts = (8,)
    """Images in a batch: one number for all sizes, or one for each, separated by commas."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device such as cpu or cuda:1."""
    mode: Literal["forward", "train"] = "forward"
    """A forward pass, or a training step: forward, backward, AdamW, nothing recomputed."""
    state_size: Positive = 1
    """State size N of LaMamba's scan, where a model's name does not say."""
    compile: bool = False
    """Compile all networks with torch.compile (on CPUs it needs a C++ compiler)."""
    seconds: Annotated[float, Ge(0)] = 60.0
    """How long each network is timed at each size; at least three passes all the same."""
    processes: Literal["auto", "together", "apart"] = "auto"
    """Networks in memory together, taking turns pass by pass, or loaded one after the other, twice over; "auto":
    LaMamba takes turns with one peer after the other where not all fit together."""
    threads: Threads | None = None
    """CPU threads of each network; by default torch's choice."""
    pack: bool = True
    """Pack weights of Linear layers and convolutions for oneDNN on CPUs, of all networks."""
    json: FilePath | None = None
    """Write rows, ratios and environment to this file, and go on from it after an interruption."""
    markdown: FilePath | None = None
    """Write the table to this file."""
    plot: FilePath | None = None
    """Draw time and multiply-adds against the number of tokens into this PNG."""
    plot_efficiency: FilePath | None = None
    """Draw images/s over multiply-adds into this PNG: a point for each network, lines of equal efficiency."""

    def __post_init__(self) -> None:
        if not self.models or not self.image_sizes:
            raise ValueError("name at least one model and one image size, such as s and 256")
        if len(set(self.image_sizes)) < len(self.image_sizes):
            raise ValueError(f"image_sizes={self.image_sizes} has a size twice; once is enough")
        for name in ("plot", "plot_efficiency"):
            if (path := getattr(self, name)) is not None and path.suffix.lower() != ".png":
                raise ValueError(f"{name}={path}: the picture is a .png")
        if len({path.absolute() for path in self.paths}) < len(self.paths):
            raise ValueError("json, markdown, plot and plot_efficiency name one file twice: give each its own")
        if len(self.batch) not in (1, len(self.image_sizes)):
            raise ValueError(
                f"batch has {len(self.batch)} numbers for {len(self.image_sizes)} image sizes; give one, or one for "
                "each"
            )

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of all files that are written."""
        return tuple(path for path in (self.json, self.markdown, self.plot, self.plot_efficiency) if path)
