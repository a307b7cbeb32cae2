"""The measured time of every unit, for plans by time: parameters are not speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lamamba.compression.units import Removable
from lamamba.utils.progress import Progress, Report


def measure_times(
    network: Removable, forward: Callable[[], object], *, rounds: int = 5, report: Report = lambda progress: None
) -> dict[str, float]:
    """Seconds that a forward pass is shorter without each unit, and "" of the whole pass: medians over rounds.

    In each round the whole network is timed before and after each unit: slow drifts of the machine cancel.

    Args:
        network: by `find_units`.
        forward: one forward pass at the batch size and resolution to plan for.
        rounds: of all units.
    """
    def seconds() -> float:
        return _seconds(forward, device)

    device = next(network.model.parameters()).device
    names = [unit.name for unit in network.units]
    saved: dict[str, list[float]] = {name: [] for name in names}
    wholes = [(seconds(), seconds())[1]]
    for turn in range(rounds):
        for number, name in enumerate(names):
            with network.masked([name]):
                without = seconds()
            wholes.append(seconds())
            saved[name].append((wholes[-2] + wholes[-1]) / 2 - without)
            report(Progress("timing", turn * len(names) + number + 1, rounds * len(names), unit="passes", note=name))
    found = {name: max(0.0, statistics.median(each)) for name, each in saved.items()}
    return {"": statistics.median(wholes), **found}


def measure_pair(
    whole: Callable[[], object], pruned: Callable[[], object], device: torch.device, *, rounds: int = 10
) -> tuple[float, float]:
    """Seconds of two forward passes in turns: medians over rounds, after a pass of each to warm up."""
    pairs = [(_seconds(whole, device), _seconds(pruned, device)) for _ in range(rounds + 1)][1:]
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def _seconds(forward: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
