"""lamamba app: a page in the browser to play on."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lamamba.cli.parse import parse

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from lamamba.app.session import Session

DESCRIPTION = """Open a page on which to choose classes and settings, watch the denoising, and keep the pictures.

  lamamba app                                   the digits that come with the package
  lamamba app runs/photos

It needs an extra: pip install 'lamamba-diff[app]'. The page answers this computer alone unless --host says otherwise,
and loads nothing from the internet. Requests wait for their turn."""


@dataclass(frozen=True, kw_only=True)
class AppArguments:
    model: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder, checkpoint, or converted model; by default the digits that come with the package."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets everybody in who can reach this computer."""
    port: int | None = None
    """By default the first free one from 7860."""
    share: bool = False
    """A public link through gradio's servers, for 72 hours. Everybody who knows it can use the page."""
    open: bool = False
    """Open a browser, too."""
    autoencoder: str | None = None
    """For models of latents: a diffusers autoencoder; by default the one of the training."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device."""


def main(arguments: list[str]) -> None:
    chosen = parse(AppArguments, arguments, "app", DESCRIPTION)
    if chosen.port is not None and not 0 < chosen.port < 65536:
        raise ValueError(f"--port {chosen.port} is no port; 1024 to 65535 are for everybody")
    if chosen.port is not None:
        _check_free(chosen.host, chosen.port)
    if importlib.util.find_spec("gradio") is None:
        raise RuntimeError("the page needs gradio: pip install 'lamamba-diff[app]'")

    from lamamba.app.page import serve
    from lamamba.viz.grids import grid_picture

    studio = open_studio(chosen.model, chosen.autoencoder, chosen.device)
    print(f"{studio.name}: {studio.parameters / 1e6:.2f} M parameters, on {studio.model.device}", flush=True)
    def compose(images: np.ndarray, columns: int, names: list[str], cell_pixels: int, crisp: bool) -> Image.Image:
        return grid_picture(images, columns, names, cell_pixels=cell_pixels, crisp=crisp)

    serve(studio, compose, host=chosen.host, port=chosen.port, share=chosen.share, browser=chosen.open)


def _check_free(host: str, port: int) -> None:
    """Refuse a port that is taken before a network is read."""
    with socket.socket() as probe:
        if os.name != "nt":                                                     # as servers do: one just left is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"port {port} is taken: give another with --port, or leave it out") from error


def open_studio(place: Path | None, autoencoder: str | None, device_name: str) -> Session:
    """The network at a place (None: the one that comes with the package), ready to draw.

    Raises:
        OSError, ValueError: when there is none, or it lacks something.
    """
    import torch

    from lamamba.app.session import Session
    from lamamba.pretrained import DESCRIPTION as SHIPPED
    from lamamba.runs.model import move, open_model
    from lamamba.utils.distributed import pick_device

    device = pick_device(device_name)
    model = open_model(place, autoencoder, device)
    name = f"{SHIPPED.capitalize()}, the model that comes with the package" if place is None else str(place)
    network = move(model.network, device, torch.float32)
    return Session(network, model.facts, name=name, source=model.name, decoder=model.decoder)
