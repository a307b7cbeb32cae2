"""Classifier-free guidance (Ho & Salimans, 2022) and autoguidance (Karras et al., 2024), and label dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from lamamba.config import UNetConfig, check_known
from lamamba.diffusion.schedule import NUM_TIMESTEPS
from lamamba.options.base import checked
from lamamba.utils.text import shown

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x (b, c, h, w), timestep (b,)) -> the network's output."""
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x (b, c, h, w), timestep (b,), labels (b,) or None) -> the network's output."""

GuidedChannels = Literal["all", "first-three"]
FIRST_CHANNELS = 3
"""Channels that the released DiT code guides: three, although latents have four."""


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_label: int) -> Tensor:
    """Label dropout: replace each label by null_label where its uniform number is below probability: (b,) int64.

    Args:
        labels: (b,) int64.
        uniform: (b,) in [0, 1), drawn for each label.
        probability: of a dropped label.
        null_label: the "no class" label, num_classes.
    """
    return torch.where(uniform.to(labels.device) < probability, null_label, labels)


@checked
@dataclass(frozen=True)
class Guidance:
    """Settings of guidance: scale, channels, interval of timesteps, rescaling.

        guided = guiding + scale (prediction - guiding)

    guiding is the unconditional prediction, or another model's (autoguidance).

    Raises:
        ValueError: for numbers out of range.
    """

    scale: float = 1.0
    """1 is no guidance and costs one evaluation instead of two."""
    channels: GuidedChannels = "all"
    """Guided channels: "all" of the prediction (the paper's code) or the "first-three" (DiT's)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guide only where timestep / 1000 lies between these, both included; 0 is clean, 1 is noise (Kynkaanniemi et al.,
    2024). Other steps cost one evaluation."""
    rescale: float = 0.0
    """0 .. 1: how far each image's standard deviation is rescaled to the prediction's (Lin et al., 2024, Eq. 15-16)."""

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, Real) or not abs(self.scale) < 1e30:
            raise ValueError(
                f"guidance scale {shown(self.scale, 40)} is no finite number; 1 is none, 1.5 to 4 are usual")
        object.__setattr__(self, "scale", float(self.scale))                    # NumPy's, too
        check_known("guided channels", self.channels, get_args(GuidedChannels))
        if isinstance(self.interval, Iterable):
            object.__setattr__(self, "interval", tuple(self.interval))          # lists and arrays, too
        is_pair = isinstance(self.interval, tuple) and [isinstance(x, Real) for x in self.interval] == [True, True]
        if not is_pair or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval {self.interval} must be two numbers, 0 <= low <= high <= 1 (noise)")
        if not isinstance(self.rescale, Real) or not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale {shown(self.rescale, 40)} must lie in 0 (off) .. 1")

    def is_on_at(self, t: Tensor) -> bool:
        """Whether guidance applies at the images' common timestep (b,)."""
        if self.scale == 1:
            return False
        low, high = self.interval
        return self.interval == (0, 1) or low <= float(t[0]) / NUM_TIMESTEPS <= high

    def apply(self, output: Tensor, guiding: Tensor, channels: int) -> Tensor:
        """Guide the prediction: (b, >= channels, h, w), like output.

        Args:
            output: (b, >= channels, h, w); channels after the first `channels`, the variance, are returned as they are.
            guiding: (b, >= channels, h, w), the unconditional or the guiding model's output.
            channels: of the prediction.
        """
        prediction, rest, guiding = output[:, :channels], output[:, channels:], guiding[:, :channels]
        result = guiding + self.scale * (prediction - guiding)
        if self.channels == "first-three":
            result = torch.cat([result[:, :FIRST_CHANNELS], prediction[:, FIRST_CHANNELS:]], dim=1)
        if self.rescale:
            dims = (1, 2, 3)
            ratio = prediction.std(dims, keepdim=True) / result.std(dims, keepdim=True)
            result = result * (self.rescale * ratio + 1 - self.rescale)
        return torch.cat([result, rest], dim=1)


def check_guidance(config: UNetConfig, guidance: Guidance, *, has_guiding_model: bool = False) -> None:
    """Check that a model takes these settings of guidance: a flow map takes a scale alone, in its range.

    Raises:
        ValueError: for a scale out of range, and for settings that need a second evaluation.
    """
    if config.objective != "flow-map":
        return
    config.check_guidance(guidance.scale)
    if has_guiding_model or guidance != Guidance(guidance.scale):
        raise ValueError(
            "guidance was trained into this flow map: it takes a scale alone, no guided channels, interval, rescaling "
            "or guiding model"
        )


def check_guiding_model(config: UNetConfig, guiding_model: UNetConfig) -> None:
    """Check that a guiding model fits a model.

    Raises:
        ValueError: when objective, channels or classes differ.
    """
    for name in ("objective", "in_channels", "num_classes"):
        own, guiding = getattr(config, name), getattr(guiding_model, name)
        if own != guiding:
            raise ValueError(
                f"the guiding model has {name}={shown(guiding)}, the model has {shown(own)}: "
                "guide by a smaller or an earlier model of the same data"
            )


def guided(
    model: Network, labels: Tensor | None, guidance: Guidance | float, num_classes: int, *,
    guiding_model: Network | None = None,
) -> Predict:
    """Return the guided prediction as a function of (x, t).

        uncond + scale (cond - uncond)      on the prediction's channels

    Variance channels are the conditional pass's. With guidance, both passes run as one batch of 2 b.

    Args:
        model: a network with labels (b,) in 0 .. num_classes.
        labels: (b,) int64; None for an unconditional model.
        guidance: the settings, or the scale alone.
        num_classes: 0 for an unconditional model; otherwise also the "no class" label.
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
