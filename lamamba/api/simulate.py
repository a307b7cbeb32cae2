"""lamamba.simulate: a training run on devices that are not here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lamamba.benchmarking.scaling import BYTES, MOST_DEVICES, Estimate, ScalingModel, device_named
from lamamba.benchmarking.simulation import Kind, Step
from lamamba.config import UNetConfig
from lamamba.options.base import verb
from lamamba.options.scaling import SimulateOptions
from lamamba.training.loop import describe
from lamamba.training.sources import plan_data
from lamamba.utils.files import check_target
from lamamba.utils.text import counted
from lamamba.viz.curves import scaling_curves

logger = logging.getLogger("lamamba.api")

NAMES: Mapping[Kind, str] = {"ddp": "DDP", "fsdp": "FSDP2", "hsdp": "HSDP"}


@dataclass(frozen=True)
class SimulateResult:
    """A step of a training run, simulated on a number of devices, and estimated on others."""

    options: SimulateOptions
    architecture: UNetConfig
    operations: int
    """Of an image, forward and backward."""
    steps: dict[Kind, Step]
    """Simulated on options.world_size devices, with averages in the memory."""
    estimates: tuple[Estimate, ...]
    """For 1 to 1,024 devices and options.world_size, in every way."""
    picture: Path | None = None

    def estimate(self, kind: Kind, devices: int | None = None) -> Estimate:
        """Of a way and a number of devices, by default options.world_size."""
        devices = devices or self.options.world_size
        return next(each for each in self.estimates if (each.kind, each.devices) == (kind, devices))

    def hours(self, kind: Kind, devices: int | None = None) -> float:
        """Of all devices together, for all images of the run."""
        config, estimate = self.options.config, self.estimate(kind, devices)
        return config.steps * config.batch_size / estimate.images_per_second * estimate.devices / 3600

    def communication_wins(self, kind: Kind) -> int | None:
        """The smallest number of devices where collectives take longer than operations; None up to 1,024."""
        found = (each.devices for each in self.estimates if each.kind == kind and each.communication > each.compute)
        return min(found, default=None)

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._simulated(), "", *self._table(), "", *self._crossings()])

    def _head(self) -> Iterator[str]:
        options, cluster = self.options, self.options.cluster
        name, device = device_named(options.device)
        precision = "bfloat16" if options.precision.autocast == "bfloat16" else \
            "TF32" if options.precision.tf32 else "float32"
        peak = {"bfloat16": device.bfloat16, "TF32": device.tf32, "float32": device.float32}[precision] / 1e12
        yield f"devices           {options.world_size} x {name}, {cluster.node_size} in a machine"
        yield f"operations        {self.operations / 1e9:,.0f} G an image, forward and backward"
        yield (
            f"assumed           {cluster.efficiency:.0%} of {cluster.tflops or peak:,.0f} TFLOP/s ({precision}); "
            f"{cluster.bandwidth_share:.0%} of {cluster.link or device.link / 1e9:,.0f} GB/s in a machine and of "
            f"{cluster.network:,.0f} GB/s for each device between; {cluster.hop:g} and {cluster.network_hop:g} "
            "microseconds a hop of a ring"
        )
        yield "                  collectives overlap with the pass that they belong to; nothing here was measured"

    def _simulated(self) -> Iterator[str]:
        yield f"a step on {counted(self.options.world_size, 'device')}, simulated (memory in MiB at the peak)"
        yield f"{'':18}" + "".join(f"{NAMES[kind]:>14}" for kind in self.steps)
        for category in BYTES:
            yield f"{category:<18}" + "".join(f"{s.memory[category] / 2**20:>14,.0f}" for s in self.steps.values())
        yield f"{'all':<18}" + "".join(f"{step.peak / 2**20:>14,.0f}" for step in self.steps.values())
        for name in ("all_gather", "reduce_scatter", "all_reduce"):
            cells = []
            for step in self.steps.values():
                number = sum(n for key, n in step.collectives.items() if key.startswith(name))
                size = sum(n for key, n in step.bytes.items() if key.startswith(name))
                cells.append(f"{number:>4} {size / 1e9:>6.2f} GB" if number else f"{'-':>14}")
            yield f"{name.replace('_', '-'):<18}" + "".join(cells)

    def _table(self) -> Iterator[str]:
        yield (
            f"{'devices':>7} {'images':>6}  {'':6}{'GiB':>7}{'gathered':>10}{'scattered':>10}{'reduced':>9}"
            f"{'ms/step':>9}{'images/s':>10}{'busy':>6}{'GPU hours':>11}"
        )
        for each in self.estimates:
            sizes = "".join(f"{size / 1e9:>{width}.2f}" for size, width in
                            ((each.gathered, 10), (each.scattered, 10), (each.reduced, 9)))
            yield (
                f"{each.devices:>7} {each.images:>6}  {NAMES[each.kind]:<6}{each.memory / 2**30:>7.1f}{sizes}"
                f"{1000 * each.seconds:>9.1f}{each.images_per_second:>10,.0f}{each.efficiency:>6.0%}"
                f"{self.hours(each.kind, each.devices):>11,.0f}"
            )
        yield "images: of a forward pass on a device; gathered, scattered, reduced: GB a step; busy: share of computing"

    def _crossings(self) -> Iterator[str]:
        _, device = device_named(self.options.device)
        for kind, name in NAMES.items():
            if not any(each.kind == kind for each in self.estimates):
                continue
            first = self.communication_wins(kind)
            where = f"from {first} devices on" if first else f"nowhere up to {MOST_DEVICES} devices"
            yield f"{name:<6} communication takes longer than computation {where}"
        large = sorted({each.devices for each in self.estimates if each.memory > device.memory})
        if large:
            yield f"warning: some ways do not fit into the device's memory on {', '.join(map(str, large))} devices"
        batch = self.options.batch_size
        if any(each.batch > batch for each in self.estimates):
            yield f"warning: more than {batch} devices have one image each, a larger batch than batch_size={batch}"


@verb
def simulate(options: SimulateOptions) -> SimulateResult:
    """Simulate a training step on devices that are not here, with fake tensors and a fake process group.

    The memory and the collectives of a step on options.world_size devices are counted as PyTorch makes them; speeds,
    and memory on other numbers of devices, are estimates. Teachers, and a flow map's further passes, are not counted.

    Raises:
        ValueError: when the options do not fit together, or the device is unknown.
        RuntimeError: when a simulation fails.
    """
    device_named(options.device)
    if options.cluster.picture is not None:
        check_target(options.cluster.picture)
    config, devices = options.config, options.world_size
    architecture, _ = describe(config, plan_data(config))
    model = ScalingModel(config, architecture, options.cluster)
    steps = {
        kind: Step({**step.memory, "averages": model.averages(kind, devices)}, step.collectives, step.bytes)
        for kind, step in model.simulate(devices).items()
    }
    numbers = sorted({devices, *(2**power for power in range(MOST_DEVICES.bit_length()))})
    estimates = tuple(model.estimate(kind, number) for number in numbers for kind in model.kinds(number))
    if options.cluster.picture is not None:
        _, device = device_named(options.device)
        curves = {NAMES[kind]: [each for each in estimates if each.kind == kind] for kind in NAMES}
        scaling_curves(
            {name: [(each.devices, each.images_per_second, each.efficiency, each.memory) for each in found]
             for name, found in curves.items() if found}, device.memory, options.cluster.picture,
        )
    return SimulateResult(options, architecture, model.operations, steps, estimates, options.cluster.picture)
