"""The networks by name: how each is built, what it takes, what is done for its speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.benchmarking.flops import Operations, operations, saved_bytes
from lamamba.benchmarking.private_torch import FakeTensorMode
from lamamba.config import LATENT_SCALE, check_known

ATTENTION = "scaled_dot_product_attention"
CONVOLUTIONS = f"{ATTENTION}; convolutions with channels last and, on CPUs, weights packed for oneDNN"
SCANS = "our selective scan; depthwise convolutions with channels last"


@dataclass(frozen=True)
class Peer:
    """A network of the paper's tables."""

    family: str
    """Its module in this package, imported when it is built: diffusers' networks take a second."""
    make: Callable[[Any, int], nn.Module]
    """Makes it from the module, for a side of its input."""
    channels: int = 4
    """Of its input and of what it estimates."""
    scale: int = LATENT_SCALE
    """Pixels of the image along a side of an input pixel; 1: it works on pixels."""
    multiple: int = 2
    """Its input's side is a multiple of this."""
    token: int = 2
    """Side of a token in input pixels, for products of many rows."""
    image_sizes: tuple[int, ...] | None = None
    """Images that its configuration was published for; None: any."""
    care: str = ATTENTION
    """What is done for its speed."""

    def side(self, image_size: int) -> int:
        """Of its input.

        Raises:
            ValueError: when the image does not fit, with the nearest sizes that do.
        """
        step = self.scale * self.multiple
        if image_size < step or image_size % step:
            below = max(step, image_size // step * step)
            raise ValueError(f"image_size={image_size} is not a multiple of {step}; use {below} or {below + step}")
        return image_size // self.scale


def _dit(size: str, patch: int, module: Any, side: int) -> nn.Module:
    return module.DiT(module.SIZES[size], side, patch_size=patch)


PEERS = {
    "adm-256": Peer("adm", lambda m, side: m.ADM(m.SIZES[256], side), 3, 1, multiple=32, token=8,
                    image_sizes=(256,), care=CONVOLUTIONS),
    "adm-512": Peer("adm", lambda m, side: m.ADM(m.SIZES[512], side), 3, 1, multiple=64, token=16,
                    image_sizes=(512,), care=CONVOLUTIONS),
    "adm-u-256": Peer("adm", lambda m, side: m.ADMU(side), 3, 1, multiple=32, token=8,
                      image_sizes=(256,), care=CONVOLUTIONS),
    "ldm-4": Peer("ldm", lambda m, side: m.LDM(m.SIZES[4], side), 3, 4, multiple=8, token=2,
                  image_sizes=(256,), care=CONVOLUTIONS),
    "ldm-8": Peer("ldm", lambda m, side: m.LDM(m.SIZES[8], side), 4, 8, multiple=4, token=1,
                  image_sizes=(256,), care=CONVOLUTIONS),
    **{f"dit-{size}-{patch}": Peer("dit", partial(_dit, size, patch), multiple=patch, token=patch)
       for patch in (2, 4) for size in ("s", "b", "l", "xl")},
    "u-vit-h-2": Peer("u_vit", lambda m, side: m.UViT(m.H, side), image_sizes=(256,)),
    "u-vit-h-4": Peer("u_vit", lambda m, side: m.UViT(replace(m.H, patch_size=4), side), multiple=4, token=4,
                      image_sizes=(512,)),
    "dis-h-2": Peer("dis", lambda m, side: m.DiS(m.H_2, side), care=SCANS),
    "dim-huge": Peer("dim", lambda m, side: m.DiM(m.HUGE, side), care=SCANS),
}


def find_peer(name: str) -> Peer:
    """A network of the paper's tables by name.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    check_known("peer", name, PEERS)
    return PEERS[name]


def peers_for(image_size: int) -> tuple[str, ...]:
    """Names of the networks whose configuration was published for images of this size, or is for any."""
    return tuple(name for name, peer in PEERS.items() if peer.image_sizes is None or image_size in peer.image_sizes)


def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Allocate a network of the meta device where and as it runs, at once, and give it random weights.

    Convolutions have their channels last. Every module sets its own tensors by `reset_parameters`.
    """
    model.to(dtype).to(memory_format=torch.channels_last).to_empty(device=device)  # type: ignore[call-overload]
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def build_peer(name: str, image_size: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network with random weights, allocated on its device and in its dtype at once."""
    model = _on_meta(name, image_size)
    materialise(model, device, dtype)
    return model


def _on_meta(name: str, image_size: int) -> nn.Module:
    peer = find_peer(name)
    module = import_module(f"lamamba.benchmarking.peers.{peer.family}")
    with torch.device("meta"):
        return nn.Module.to(peer.make(module, peer.side(image_size)), "meta")   # diffusers' own imports for seconds


def _inputs(name: str, image_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    peer = find_peer(name)
    side = peer.side(image_size)
    return (
        torch.empty(1, peer.channels, side, side, device=device), torch.empty(1, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


@cache
def peer_operations(name: str, image_size: int) -> Operations:
    """Parameters and operations of one image, counted on the meta device."""
    return operations(_on_meta(name, image_size), *_inputs(name, image_size, "meta"))


@cache
def peer_activation_bytes(name: str, image_size: int) -> int:
    """Bytes saved for the backward pass of one image in float32, counted on fake tensors: nothing is computed."""
    model = _on_meta(name, image_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return saved_bytes(model, *_inputs(name, image_size, "cpu"))
