"""Classifier-free guidance: dropping labels in training, exaggerating them in sampling (Ho & Salimans, 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x (b, c, h, w), timestep (b,)) -> the network's output."""


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace a label by "no class" where its own uniform number lies below the probability: (b,) int64."""
    return torch.where(uniform.to(labels.device) < probability, null_label, labels)


def guided(
    model: Callable[[Tensor, Tensor, Tensor | None], Tensor], labels: Tensor | None, scale: float, num_classes: int
) -> Predict:
    """A function of (x, t) that predicts with the labels, exaggerated by `scale`.

        uncond + scale (cond - uncond)      on the prediction's channels, all of them (as in the paper's code)

    The variance channels, if the output has any, stay the conditional pass's own. Scale 1 costs one evaluation.

    Raises:
        ValueError: when an unconditional model is to be guided, or labels are missing.
    """
    if num_classes == 0:
        if labels is not None:
            raise ValueError("the model is unconditional (num_classes=0): it takes no labels")
        if scale != 1:
            raise ValueError(f"guidance {scale} needs a class-conditional model; this one is unconditional: use 1")
        return lambda x, t: model(x, t, None)
    if labels is None:
        raise ValueError(f"the model is class-conditional: give labels in 0 .. {num_classes - 1}")
    if scale == 1:
        return lambda x, t: model(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, num_classes)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output = model(torch.cat([x, x]), torch.cat([t, t]), both)
        cond, uncond = output.chunk(2)
        channels = x.shape[1]
        prediction = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([prediction, cond[:, channels:]], dim=1)

    return predict
