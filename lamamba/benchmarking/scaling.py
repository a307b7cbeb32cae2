"""Memory, communication and time of a training step on many devices, by counting and an assumed cost model.

    step     forward and backward pass; each overlaps with its own communication and takes the longer of both
    DDP      sums 4 P bytes of gradients while the backward pass of the last micro-batch runs
    FSDP2    gathers each group of weights for the forward and for the backward pass, sums and scatters its gradients
    HSDP     the same among `shard_size` devices, and sums the scattered gradients over the copies
    ring     n devices gather or scatter s bytes in s (n - 1) / n / rate, and n - 1 hops for each collective
    tree     n devices sum s bytes in 2 s (n - 1) / n / rate, and 2 log2(n) hops for each collective

A group is a block, or all layers outside of blocks. P is the number of parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lamamba.benchmarking.flops import lamamba_operations
from lamamba.benchmarking.private_distributed import ddp_buckets
from lamamba.benchmarking.simulation import Kind, Setup, Step, begin, finish
from lamamba.config import UNetConfig, check_known
from lamamba.models.blocks import LaMambaBlock
from lamamba.models.unet import LaMambaUNet
from lamamba.options.scaling import ClusterOptions
from lamamba.options.training import TrainConfig
from lamamba.training.distributed import shard_dimension

FLOAT = 4
STATE_COPIES = 3
"""Weights and AdamW's two moments."""
BYTES = ("weights", "gathered weights", "gradients", "optimizer", "averages", "activations", "temporary")
"""Categories of memory, in the order of a table."""
MOST_DEVICES = 1024
LARGE_MICRO_BATCH = 64
"""The largest that is simulated, for the memory of small numbers of devices."""


@dataclass(frozen=True)
class Device:
    """A data sheet: dense operations a second by precision, memory in bytes, bytes a second each way to its machine."""

    bfloat16: float
    tf32: float
    float32: float
    memory: float
    link: float
    bandwidth: float
    """Of its memory, bytes a second."""
    multiprocessors: int
    clock: float
    """Cycles a second that a long computation can expect."""


DEVICES = {
    "a100": Device(312e12, 156e12, 19.5e12, 80e9, 300e9, 2.04e12, 108, 1.41e9),
    "h100": Device(989e12, 494e12, 67e12, 80e9, 450e9, 3.35e12, 132, 1.755e9),
    "h200": Device(989e12, 494e12, 67e12, 141e9, 450e9, 4.8e12, 132, 1.755e9),
    "b200": Device(2250e12, 1100e12, 75e12, 180e9, 900e9, 8e12, 148, 1.85e9),
}
"""NVIDIA's SXM modules."""


@dataclass(frozen=True)
class Estimate:
    """A training step on a number of devices."""

    kind: Kind
    devices: int
    batch: int
    """Images of a step: those of the configuration, or one for each device where that is more."""
    images: int
    """Of a forward pass on a device, at most."""
    memory: int
    """Bytes of a device at the peak."""
    gathered: int
    """Bytes of all weights that a device gathers in a step, and"""
    scattered: int
    """of the gradients that are summed and scattered, and"""
    reduced: int
    """summed and kept whole; sizes of the whole tensors."""
    collectives: int
    compute: float
    """Seconds of a step for operations alone."""
    communication: float
    """Seconds of a step for collectives alone."""
    seconds: float
    """Of a step."""

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def efficiency(self) -> float:
        """Time of the operations over that of the step."""
        return self.compute / self.seconds


def device_named(name: str) -> tuple[str, Device]:
    """A device by its name; "auto" and "cuda" are an H100.

    Raises:
        ValueError: for another name.
    """
    name = "h100" if name in ("auto", "cuda") else name.lower()
    check_known("device", name, DEVICES)
    return name, DEVICES[name]


class ScalingModel:
    """Estimates for any number of devices.

    Args:
        config: of the run.
        architecture: of its network.
        cluster: assumed speeds.
    """

    def __init__(self, config: TrainConfig, architecture: UNetConfig, cluster: ClusterOptions):
        _, device = device_named(config.device)
        self._config, self._architecture, self._cluster = config, architecture, cluster
        self._bfloat16 = config.precision.autocast == "bfloat16"
        peak = device.bfloat16 if self._bfloat16 else device.tf32 if config.precision.tf32 else device.float32
        self._speed = cluster.efficiency * (cluster.tflops * 1e12 if cluster.tflops else peak)
        share = cluster.bandwidth_share
        self._link = share * (cluster.link * 1e9 if cluster.link else device.link)
        self._node_network = share * cluster.network * 1e9 * cluster.node_size
        self._groups = parameter_groups(architecture)
        with torch.device("meta"):
            self._buckets = ddp_buckets(list(LaMambaUNet(architecture).parameters()))
        self._peaks: dict[tuple[Kind, int], int] = {}
        """Simulated bytes, without averages."""
        self._extra: dict[Kind, list[tuple[int, int]]] = {}
        """(images, bytes besides the state): of a network in one piece they grow linearly, and of a sharded one as
        fast where they exceed what is gathered."""

    @property
    def operations(self) -> int:
        """Of an image, forward and backward."""
        return self._forward + self._backward

    @cached_property
    def _forward(self) -> int:
        """Operations of an image."""
        cost = lamamba_operations(self._architecture)
        return 2 * cost.matrix + cost.scan

    @property
    def _backward(self) -> int:
        return (3 if self._config.processes.checkpoint_activations else 2) * self._forward

    def kinds(self, devices: int) -> list[Kind]:
        """What this number of devices can do."""
        size = self.shard_size("hsdp", devices)
        hybrid: list[Kind] = ["hsdp"] if devices > size >= 2 and devices % size == 0 else []
        return ["ddp", "fsdp", *hybrid] if devices > 1 else ["ddp"]

    def shard_size(self, kind: Kind, devices: int) -> int:
        """Devices that hold a network together."""
        if kind == "hsdp":
            return self._config.processes.shard_size or self._cluster.node_size
        return devices if kind == "fsdp" else 1

    def images(self, devices: int) -> int:
        """Of a forward pass on a device, at most."""
        batch = max(self._config.batch_size, devices)
        return math.ceil(math.ceil(batch / devices) / self._config.processes.accumulation_steps)

    def simulate(self, devices: int) -> dict[Kind, Step]:
        """Simulate a step on this number of devices in each way; memory of other numbers follows from these.

        Raises:
            RuntimeError: when a simulation fails.
        """
        own = self.images(devices)
        whole = (own, LARGE_MICRO_BATCH) if own < LARGE_MICRO_BATCH else (1, own)
        sizes: dict[Kind, tuple[int, ...]] = {"ddp": whole, "fsdp": tuple(sorted({1, own})), "hsdp": (own,)}
        begun = {
            kind: begin(Setup(
                self._architecture.to_dict(), kind, devices, self.shard_size(kind, devices), sizes[kind],
                self._config.processes.accumulation_steps, self._bfloat16,
                self._config.processes.checkpoint_activations,
            ))
            for kind in self.kinds(devices)
        }
        assert self.operations                                                  # counted while the simulations run
        simulated = {kind: finish(process) for kind, process in begun.items()}
        for kind, steps in simulated.items():
            held = STATE_COPIES * FLOAT * self._held(self.shard_size(kind, devices))
            self._extra[kind] = [(size, step.peak - held) for size, step in zip(sizes[kind], steps, strict=True)]
        result = {kind: steps[sizes[kind].index(own)] for kind, steps in simulated.items()}
        self._peaks = {(kind, devices): step.peak for kind, step in result.items()}
        return result

    def estimate(self, kind: Kind, devices: int) -> Estimate:
        """A step; its memory from `simulate`, which came before."""
        shards, options = self.shard_size(kind, devices), self._config.processes
        batch, accumulated = max(self._config.batch_size, devices), options.accumulation_steps
        gathered, scattered, reduced = self.traffic(kind, devices)
        groups = len(self._groups)
        collectives = (2 * accumulated + 1) * groups if kind != "ddp" else 0
        inside, between = 0.0, 0.0
        if kind == "ddp" and devices > 1:
            collectives = self._buckets
            between = self._reduce(reduced, collectives, devices)
        elif kind != "ddp":
            inside = self._ring(gathered, 2 * accumulated * groups, shards)
            scatter = self._ring(scattered, groups, shards)
            if kind == "hsdp":
                collectives += groups
                between = self._reduce(reduced, groups, devices // shards, rings=shards)
        images = batch / devices
        forward, backward = images * self._forward / self._speed, images * self._backward / self._speed
        if kind == "ddp":
            scatter, last = 0.0, backward / accumulated
            seconds = forward + backward - last + max(last, between)
        else:
            seconds = max(forward, inside / 2) + max(backward, inside / 2 + scatter, between)
        return Estimate(
            kind, devices, batch, self.images(devices), self._memory(kind, devices), gathered, scattered, reduced,
            collectives, forward + backward, inside + scatter + between, seconds,
        )

    def traffic(self, kind: Kind, devices: int) -> tuple[int, int, int]:
        """Bytes gathered, scattered and reduced in a step: of whole tensors, with padding."""
        shards = self.shard_size(kind, devices)
        if kind == "ddp":
            return 0, 0, FLOAT * self._held(1) if devices > 1 else 0
        sizes = [sum(padded(shape, shards) for shape in group) for group in self._groups]
        in_blocks = FLOAT // 2 if self._bfloat16 else FLOAT
        once = in_blocks * sum(sizes[:-1]) + FLOAT * sizes[-1]                  # the last group is outside of blocks
        scattered = FLOAT * sum(sizes)
        gathered = 2 * self._config.processes.accumulation_steps * once
        return gathered, scattered, scattered // shards if kind == "hsdp" else 0

    def averages(self, kind: Kind, devices: int) -> int:
        """Bytes of the averaged networks on a device."""
        return len(self._config.ema_decays) * FLOAT * self._held(self.shard_size(kind, devices))

    def _held(self, shards: int) -> int:
        """Parameters that a device holds, with padding."""
        return sum(padded(shape, shards) // shards for group in self._groups for shape in group)

    def _memory(self, kind: Kind, devices: int) -> int:
        """Bytes at the peak: simulated, or the state and, interpolated over the images, what simulated steps add."""
        if (kind, devices) in self._peaks:
            return self._peaks[kind, devices] + self.averages(kind, devices)
        (few, least), (many, most) = self._extra["ddp"]
        sizes, extras = zip(*self._extra["fsdp" if kind != "ddp" and "fsdp" in self._extra else "ddp"], strict=True)
        images = self.images(devices)
        nearest = min(max(images, sizes[0]), sizes[-1])
        extra = np.interp(nearest, sizes, extras) + (images - nearest) * (most - least) / (many - few)
        state = STATE_COPIES * FLOAT * self._held(self.shard_size(kind, devices))
        return round(state + extra) + self.averages(kind, devices)

    def _ring(self, size: int, number: int, devices: int) -> float:
        """Seconds for a number of gathers or scatters of so many bytes in all (whole tensors)."""
        cluster, nodes = self._cluster, math.ceil(devices / self._cluster.node_size)
        hops = (devices - nodes) * cluster.hop + (nodes - 1) * cluster.network_hop
        return size * (devices - 1) / devices / self._rate(nodes) + number * hops * 1e-6

    def _reduce(self, size: int, number: int, devices: int, rings: int = 1) -> float:
        """Seconds for a number of sums of so many bytes in all.

        Args:
            size: of the tensors.
            number: of collectives.
            devices: that sum.
            rings: groups that sum side by side, neighbouring devices in different ones.
        """
        cluster = self._cluster
        nodes = min(devices, math.ceil(devices * rings / cluster.node_size))
        hops = math.log2(devices / nodes) * cluster.hop + math.log2(nodes) * cluster.network_hop
        return 2 * size * (devices - 1) / devices / self._rate(nodes, rings) + number * 2 * hops * 1e-6

    def _rate(self, nodes: int, rings: int = 1) -> float:
        """Bytes a second of a ring through so many machines, each of which it leaves by the network of its devices."""
        if nodes == 1:
            return self._link
        return min(self._link, self._node_network / min(rings, self._cluster.node_size))


def parameter_groups(config: UNetConfig) -> list[list[tuple[int, ...]]]:
    """Shapes of the weights of each block, and last of all layers outside of blocks: what FSDP2 gathers at once."""
    with torch.device("meta"):
        model = LaMambaUNet(config)
    blocks = [block for block in model.modules() if isinstance(block, LaMambaBlock)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [[tuple(p.shape) for p in group] for group in (*(block.parameters() for block in blocks), rest)]


def padded(shape: tuple[int, ...], shards: int) -> int:
    """Elements of a tensor in equal shards: padded on its first dimension where none divides evenly."""
    if shard_dimension(shape, shards) is not None:
        return math.prod(shape)
    return math.ceil(shape[0] / shards) * shards * math.prod(shape[1:])
