"""DINOv2's features, for FD-DINOv2 as EDM2 computes it. Needs transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lamamba.metrics.features import FeatureNetworkInfo, Outputs, hash_weights, to_arrays, to_tensor

DEFAULT_WEIGHTS = "facebook/dinov2-large"


class DinoFeatures:
    """DINOv2's class token after the final norm, as EDM2 computes FD-DINOv2: ViT-L/14 on 224 x 224 pixels.

    Args:
        weights: a folder or hub id of transformers' Dinov2Model; only safetensors are read.

    Raises:
        RuntimeError: when transformers is not installed.
        OSError, ValueError: when there is no such model, or it is another one.
    """

    distance_name = "FD-DINOv2"
    has_class_logits = False
    SIDE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        try:
            from transformers import Dinov2Model
        except ModuleNotFoundError as error:
            raise RuntimeError("DINOv2 comes with transformers: pip install 'lamamba-diff[dinov2]'") from error
        try:
            model = Dinov2Model.from_pretrained(str(weights or DEFAULT_WEIGHTS), use_safetensors=True)
        except OSError as error:
            raise OSError(
                f"DINOv2's weights {weights or DEFAULT_WEIGHTS} cannot be had ({' '.join(str(error).split())[:200]}); "
                "name a folder that holds them: weights=FOLDER. Without them: features=inception or module:function"
            ) from error
        _fit_positions(model, self.SIDE)
        for tensor in [*model.parameters(), *model.buffers()]:                  # of a file that is mapped
            tensor.data = tensor.data.clone()
        self._model, self._device = model.eval().requires_grad_(False).to(device), device
        name = f"dinov2-{model.config.hidden_size}-{model.config.num_hidden_layers}"
        resize = f"{self.SIDE} x {self.SIDE}, bicubic with antialiasing"
        self.info = FeatureNetworkInfo(name, hash_weights(model), resize, 3)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Outputs:
        x = to_tensor(images, self._device) / 255
        x = F.interpolate(x, size=(self.SIDE, self.SIDE), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return to_arrays({"features": self._model(pixel_values=(x - mean) / std).pooler_output})


def _fit_positions(model: Any, side: int) -> None:
    """Interpolate position embeddings to the grid of `side` pixels with DINOv2's offset: a scale 0.1 tokens too large.

    transformers omits the offset; published figures have it.
    """
    embeddings = model.embeddings
    table = embeddings.position_embeddings.detach()                             # (1, 1 + M M, d), the class token first
    old, new = round((table.shape[1] - 1) ** 0.5), side // model.config.patch_size
    if old == new:
        return
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    scale = (new + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    if grid.shape[-2:] != (new, new):
        raise ValueError(f"position embeddings of {old} x {old} do not come to {new} x {new}; use dinov2-large")
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(table)
    embeddings.position_embeddings = torch.nn.Parameter(torch.cat([table[:, :1], grid], dim=1))
