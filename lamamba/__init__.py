"""LaMamba-Diff: image diffusion in linear time (arXiv 2408.02615).

    import lamamba
    config = lamamba.UNetConfig.preset("xl", image_size=256)
    model = lamamba.LaMambaUNet(config)                     # model(x, timestep, class_labels)

Names are imported when they are first used, so that `import lamamba` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamamba._version import __version__

if TYPE_CHECKING:
    from lamamba.config import UNetConfig
    from lamamba.models.official import load_official, to_official
    from lamamba.models.unet import LaMambaUNet
    from lamamba.pipeline import LaMambaPipeline

_HOMES = {
    "UNetConfig": "lamamba.config",
    "LaMambaUNet": "lamamba.models.unet",
    "LaMambaPipeline": "lamamba.pipeline",
    "load_official": "lamamba.models.official",
    "to_official": "lamamba.models.official",
}

__all__ = ["LaMambaPipeline", "LaMambaUNet", "UNetConfig", "__version__", "load_official", "to_official"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lamamba' has no attribute {name!r}")
