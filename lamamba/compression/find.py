"""The removable units of any network that can be compressed."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel

from lamamba.compression.diffusers_units import DiffusersUnits
from lamamba.compression.lamamba_units import LaMambaUnits
from lamamba.compression.units import Removable, Unit
from lamamba.models.unet import LaMambaUNet


def find_units(model: Any) -> Removable:
    """A network as removable units.

    Raises:
        ValueError: for a network of another kind.
    """
    if isinstance(model, LaMambaUNet):
        return LaMambaUnits(model)
    if isinstance(model, UNet2DModel | UNet2DConditionModel):
        return DiffusersUnits(model)
    raise ValueError(f"{type(model).__name__} is neither a LaMambaUNet nor a U-Net of diffusers")


def candidates(model: Any) -> tuple[Unit, ...]:
    """What can be removed from a network; a unit stands before those inside it.

    Raises:
        ValueError: for a network that is neither a LaMambaUNet nor a U-Net of diffusers.
    """
    return find_units(model).units
