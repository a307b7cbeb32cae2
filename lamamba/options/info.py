"""Options of `lamamba.info`."""

from __future__ import annotations

from typing import Annotated

import tyro

from lamamba.options.base import Ge, Name, Positive, options


@options
class InfoOptions:
    """Which network to count."""

    model: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "xl"
    """A preset (s, b, l, xl), "shipped", or the folder of a run, checkpoint, model or pipeline."""
    image_size: Positive | None = None
    """Side of the image in pixels (256), 8 times the latent's; only for presets."""
    state_size: Positive | None = None
    """State size N of the scan (1); only for presets."""
    num_classes: Annotated[int | None, Ge(0)] = None
    """Class labels (1000); 0: unconditional. Only for presets."""
    compare: bool = False
    """The paper's table of systems instead: our counts beside the published ones, and what is wrong there."""
