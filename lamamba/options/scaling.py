"""Options of `lamamba.simulate`: a training run on devices that are not here."""

from __future__ import annotations

from typing import Annotated

from lamamba.options.base import Above0, FilePath, Gt, Le, Positive, options
from lamamba.options.training import TrainOptions

Share = Annotated[float, Gt(0), Le(1)]


@options
class ClusterOptions:
    """Speeds that a prediction assumes; nothing here is measured."""

    node_size: Positive = 8
    """Devices of a machine, joined by fast links."""
    efficiency: Share = 0.4
    """Share of the device's peak operations that training reaches."""
    tflops: Above0 | None = None
    """Peak of the device in the run's precision, 10^12 operations a second; by default from its data sheet."""
    link: Above0 | None = None
    """GB/s each way from a device to the others of its machine; by default from its data sheet."""
    network: Above0 = 50.0
    """GB/s each way from a device to other machines."""
    bandwidth_share: Share = 0.8
    """Share of links and network that collectives reach."""
    hop: Above0 = 1.0
    """Microseconds for a step of a ring from device to device in a machine."""
    network_hop: Above0 = 12.0
    """Microseconds for a step of a ring between machines."""
    picture: FilePath | None = None
    """A PNG of speed, efficiency and memory for 1 to 1,024 devices; none by default."""


@options
class SimulateOptions(TrainOptions):
    """A training run, on a number of devices. Its device is a100, h100 (also for auto), h200 or b200."""

    world_size: Positive = 8
    """Devices."""
    cluster: ClusterOptions = ClusterOptions()
