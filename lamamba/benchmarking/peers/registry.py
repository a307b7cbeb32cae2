"""The networks by name: how each is built, what it takes, what is done for its speed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lamamba.benchmarking.flops import Operations, operations, saved_bytes
from lamamba.benchmarking.peers import adm, dim, dis, dit, ldm, u_vit
from lamamba.config import LATENT_SCALE, unknown_name

ATTENTION = "scaled_dot_product_attention"
CONVOLUTIONS = f"{ATTENTION}; convolutions with channels last and, on CPUs, weights packed for oneDNN"
SCANS = "our selective scan; depthwise convolutions with channels last"


@dataclass(frozen=True)
class Peer:
    """A network of the paper's tables."""

    build: Callable[[int], nn.Module]
    """Makes it for a side of its input."""
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
            raise ValueError(
                f"image_size={image_size} is not a multiple of {step}; use {below} or {below + step}"
            )
        return image_size // self.scale


def _dit(size: str, patch: int) -> Peer:
    return Peer(functools.partial(dit.DiT, dit.SIZES[size], patch_size=patch), multiple=patch, token=patch)


PEERS = {
    "adm-256": Peer(
        functools.partial(adm.ADM, adm.SIZES[256]), 3, 1, multiple=32, token=8, image_sizes=(256,), care=CONVOLUTIONS),
    "adm-512": Peer(
        functools.partial(adm.ADM, adm.SIZES[512]), 3, 1, multiple=64, token=16, image_sizes=(512,), care=CONVOLUTIONS),
    "adm-u-256": Peer(adm.ADMU, 3, 1, multiple=32, token=8, image_sizes=(256,), care=CONVOLUTIONS),
    "ldm-4": Peer(
        functools.partial(ldm.LDM, ldm.LDM_4), 3, 4, multiple=8, token=2, image_sizes=(256,), care=CONVOLUTIONS),
    "ldm-8": Peer(
        functools.partial(ldm.LDM, ldm.LDM_8), 4, 8, multiple=4, token=1, image_sizes=(256,), care=CONVOLUTIONS),
    **{f"dit-{size}-{patch}": _dit(size, patch) for patch in (2, 4) for size in dit.SIZES},
    "u-vit-h-2": Peer(functools.partial(u_vit.UViT, u_vit.H_2), image_sizes=(256,)),
    "u-vit-h-4": Peer(functools.partial(u_vit.UViT, u_vit.H_4), multiple=4, token=4, image_sizes=(512,)),
    "dis-h-2": Peer(functools.partial(dis.DiS, dis.H_2), care=SCANS),
    "dim-huge": Peer(functools.partial(dim.DiM, dim.HUGE), care=SCANS),
}


def find_peer(name: str) -> Peer:
    """A network of the paper's tables by name.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if name not in PEERS:
        raise unknown_name("peer", name, PEERS)
    return PEERS[name]


def peers_for(image_size: int) -> tuple[str, ...]:
    """Names of the networks whose configuration was published for images of this size, or is for any."""
    return tuple(
        name for name, peer in PEERS.items() if peer.image_sizes is None or image_size in peer.image_sizes
    )


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
    with torch.device("meta"):
        return peer.build(peer.side(image_size)).to("meta")


def _inputs(name: str, image_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    peer = find_peer(name)
    side = peer.side(image_size)
    return (
        torch.empty(1, peer.channels, side, side, device=device), torch.empty(1, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


@functools.cache
def peer_operations(name: str, image_size: int) -> Operations:
    """Parameters and operations of one image, counted on the meta device."""
    return operations(_on_meta(name, image_size), *_inputs(name, image_size, "meta"))


@functools.cache
def peer_activation_bytes(name: str, image_size: int) -> int:
    """Bytes saved for the backward pass of one image in float32, counted on fake tensors: nothing is computed."""
    model = _on_meta(name, image_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return saved_bytes(model, *_inputs(name, image_size, "cpu"))
