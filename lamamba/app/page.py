"""The page: gradio's parts around a Studio."""

from __future__ import annotations

import html
import os
import random
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lamamba.app.studio import MAX_GUIDANCE, MAX_IMAGES, MAX_SEED, Frame, Request, Studio
from lamamba.diffusion.denoise import SAMPLERS

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")                      # nobody is told that a page was opened

try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise RuntimeError("the page needs gradio: pip install 'lamamba-diff[app]'") from error

Compose = Callable[[np.ndarray, int, list[str]], Image.Image]
"""(images (n, h, w, c) uint8, columns, names of the rows) -> one picture."""
Save = Callable[[Image.Image, Path, Studio, Request], None]
"""Write a PNG with the settings that repeat it."""

FEW_CLASSES = 20
"""So many are boxes to tick; more are a list to search."""
WAITING = 200
"""Requests that may wait for their turn; the next one is told to come back later."""
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#picture img { image-rendering: pixelated; object-fit: contain; }
#picture { min-height: 420px; }
#digits .wrap { gap: 6px; }
#status { min-height: 3.2em; }
#status .bar { height: 6px; border-radius: 3px; background: var(--neutral-200); overflow: hidden; margin-top: 6px; }
#status .bar > i { display: block; height: 100%; background: var(--primary-500); }
#head h1 { margin: 0 0 2px 0; }
#head p { margin: 0; color: var(--body-text-color-subdued); }
"""


def theme() -> Any:
    """Fonts of the visitor's own system: the page loads nothing from elsewhere."""
    return gr.themes.Soft(
        primary_hue="blue", font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
