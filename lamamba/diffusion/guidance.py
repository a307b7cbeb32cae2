"""Guidance: dropping labels in training, exaggerating them in sampling (Ho & Salimans, 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lamamba.config import UNetConfig, unknown_name
from lamamba.diffusion.schedule import NUM_TIMESTEPS

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x (b, c, h, w), timestep (b,)) -> the network's output."""
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x (b, c, h, w), timestep (b,), labels (b,) or None) -> the network's output."""

GuidedChannels = Literal["all", "first-three"]
FIRST_CHANNELS = 3
"""What the released DiT code guides: three channels, even of the four that latents have."""


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace a label by "no class" where its own uniform number lies below the probability: (b,) int64."""
    return torch.where(uniform.to(labels.device) < probability, null_label, labels)


@dataclass(frozen=True)
class Guidance:
    """How far, where and when the prediction is pushed away from a guiding one.

    Raises:
        ValueError: for numbers out of range.
    """

    scale: float = 1.0
    """guiding + scale (prediction - guiding); 1 is none and costs one evaluation instead of two."""
    channels: GuidedChannels = "all"
    """"all" channels of the prediction (the paper's code) or the "first-three" (DiT's)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guide only where timestep / 1000 lies between these, both included; 0 is clean, 1 is noise (Kynkaanniemi et al.,
    2024). Elsewhere one evaluation is enough."""
    rescale: float = 0.0
    """0 .. 1: how much of the prediction's own deviation is given back to each image (Lin et al., 2024, Eq. 15-16)."""

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int | float) or not abs(self.scale) < float("inf"):
            raise ValueError(f"guidance scale {self.scale!r} is no finite number; 1 is none, 1.5 to 4 are usual")
        if self.channels not in get_args(GuidedChannels):
            raise unknown_name("guided channels", str(self.channels), get_args(GuidedChannels))
        object.__setattr__(self, "interval", tuple(self.interval))
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval {self.interval} must be two numbers, 0 <= low <= high <= 1 (noise)")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale {self.rescale} must lie in 0 (off) .. 1")

    def is_on_at(self, t: Tensor) -> bool:
        """Whether the images' common timestep (b,) is guided at all."""
        if self.scale == 1:
            return False
        low, high = self.interval
        return self.interval == (0, 1) or low <= float(t[0]) / NUM_TIMESTEPS <= high

    def apply(self, output: Tensor, guiding: Tensor, channels: int) -> Tensor:
        """Guide the prediction, the first `channels` of output (b, >= channels, h, w); its variance stays its own."""
        prediction, rest, guiding = output[:, :channels], output[:, channels:], guiding[:, :channels]
        pushed = guiding + self.scale * (prediction - guiding)
        if self.channels == "first-three":
            pushed = torch.cat([pushed[:, :FIRST_CHANNELS], prediction[:, FIRST_CHANNELS:]], dim=1)
        if self.rescale:
            every = (1, 2, 3)
            own = prediction.std(every, keepdim=True) / pushed.std(every, keepdim=True)
            pushed = pushed * (self.rescale * own + 1 - self.rescale)
        return torch.cat([pushed, rest], dim=1)


def check_guiding_model(config: UNetConfig, guiding_model: UNetConfig) -> None:
    """Refuse a network to guide by that was made for something else.

    Raises:
        ValueError: when objective, channels or classes differ.
    """
    for name in ("objective", "in_channels", "num_classes"):
        own, guiding = getattr(config, name), getattr(guiding_model, name)
        if own != guiding:
            raise ValueError(
                f"the guiding model has {name}={guiding!r}, the model has {own!r}: "
                "guide by a smaller or an earlier model of the same data"
            )


def guided(
    model: Network, labels: Tensor | None, guidance: Guidance | float, num_classes: int, *,
    guiding_model: Network | None = None,
) -> Predict:
    """A function of (x, t) that predicts with the labels, exaggerated as `guidance` says (a number: its scale).

        uncond + scale (cond - uncond)      on the prediction's channels

    The variance channels, if the output has any, stay the conditional pass's own.

    Args:
        model: predicts with labels (b,) in 0 .. num_classes.
        labels: (b,) int64; None for an unconditional model.
        num_classes: 0 for an unconditional model; elsewhere also the label that means "no class".
        guiding_model: a second network in place of the unconditional pass, with the same labels: smaller, or from
            earlier in the training (autoguidance, Karras et al., 2024). It may have no variance channels.

    Raises:
        ValueError: when an unconditional model is to be guided without a guiding model, or labels are missing.
    """
    if not isinstance(guidance, Guidance):
        guidance = Guidance(float(guidance))
    settings = guidance
    if num_classes == 0:
        if labels is not None:
            raise ValueError("the model is unconditional (num_classes=0): it takes no labels")
        if settings.scale != 1 and guiding_model is None:
            raise ValueError(
                f"guidance {settings.scale:g} needs a class-conditional model, or a guiding model; this one "
                "is unconditional: use 1"
            )
    elif labels is None:
        raise ValueError(f"the model is class-conditional: give labels in 0 .. {num_classes - 1}")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if not settings.is_on_at(t):
            return model(x, t, labels)
        if guiding_model is not None:
            return settings.apply(model(x, t, labels), guiding_model(x, t, labels), x.shape[1])
        assert labels is not None
        both = torch.cat([labels, torch.full_like(labels, num_classes)])
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return settings.apply(cond, uncond, x.shape[1])

    return predict
