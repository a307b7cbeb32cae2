"""Options of `lamamba.open_app`."""

from __future__ import annotations

from typing import Annotated

import tyro

from lamamba.options.base import FilePath, Ge, Le, Name, options


@options
class AppOptions:
    """Which model to show, and to whom."""

    model: Annotated[
        FilePath | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]", help_behavior_hint="")
    ] = None
    """Run folder, checkpoint, or converted model; by default the digits that come with the package."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets everybody in who can reach this computer."""
    port: Annotated[int | None, Ge(1), Le(65535)] = None
    """By default the first free one from 7860."""
    share: bool = False
    """A public link through gradio's servers, for 72 hours. Everybody who knows it can use the page."""
    open: bool = False
    """Open a browser, too."""
    autoencoder: Name | None = None
    """For models of latents: a diffusers autoencoder; by default the one of the training."""
    lora: FilePath | None = None
    """A LoRA of the model, a run of lamamba train --lora.rank or a folder."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device."""
