"""The measured time of every unit, for plans by time: parameters are not speed."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lamamba.compression.units import Removable
from lamamba.utils.progress import Progress, Report

Forward = Callable[..., Any]


def measure_times(
    network: Removable, forward: Callable[[], object], *, rounds: int = 10, report: Report = lambda progress: None
) -> dict[str, float]:
    """Seconds that a forward pass is shorter without each unit, and "" of the whole pass: medians over rounds.

    Units are timed within a pass, all in the same: a difference of two whole passes is mostly noise, where a unit takes
    a hundredth of them. What is computed in place of a unit is timed in the same way and subtracted. Where a unit goes
    with the last of those inside it, what it takes beside them (norms, gates, the condition's projection) is theirs, in
    equal parts.

    Args:
        network: by `find_units`.
        forward: one forward pass at the batch size and resolution to plan for.
        rounds: of passes.
    """
    modules = {name: dict(network.bypass(name)) for name in (unit.name for unit in network.units)}
    replaced = {module: other for pairs in modules.values() for module, other in pairs.items()}
    paths = {path: module for path, module in network.model.named_modules() if module in replaced}
    levels: defaultdict[int, dict[nn.Module, Forward]] = defaultdict(dict)
    for path, module in paths.items():
        levels[sum(path.startswith(f"{other}.") for other in paths)][module] = replaced[module]
    passes = [{module: module.forward for module in replaced}, *levels.values()]

    device = next(network.model.parameters()).device
    _timed(forward, {}, device)                                                 # to warm up
    found: list[list[dict[nn.Module | None, float]]] = [[] for _ in passes]
    for turn in range(rounds):
        for number, (functions, seconds) in enumerate(zip(passes, found, strict=True)):
            seconds.append(_timed(forward, functions, device))
            report(Progress("timing", turn * len(passes) + number + 1, rounds * len(passes), unit="passes"))
    taken, *others = ({key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for turns in found)
    left = {module: seconds for other in others for module, seconds in other.items()}
    saved = {name: sum(taken[m] - left[m] for m in pairs) for name, pairs in modules.items()}
    for unit in network.units:                                                  # a unit stands before those inside it
        if unit.is_sum and (inside := [other.name for other in network.units if other.parent == unit.name]):
            rest = saved[unit.name] - sum(saved[name] for name in inside)
            saved.update({name: saved[name] + rest / len(inside) for name in inside})
    return {"": taken[None], **{name: max(0.0, seconds) for name, seconds in saved.items()}}


def _timed(
    forward: Callable[[], object], functions: Mapping[nn.Module, Forward], device: torch.device
) -> dict[nn.Module | None, float]:
    """Seconds of a forward pass under None, and of modules in it, which compute these functions meanwhile."""
    spans: dict[nn.Module | None, list[tuple[Any, Any]]] = {module: [] for module in functions}

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(module: nn.Module | None, function: Forward) -> Forward:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = mark()
            result = function(*args, **kwargs)
            spans.setdefault(module, []).append((begin, mark()))
            return result

        return call

    try:
        for module, function in functions.items():
            module.forward = timed(module, function)                            # on the instance: the class's is below
        timed(None, forward)()
    finally:
        for module in functions:
            module.__dict__.pop("forward", None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return {key: sum(a.elapsed_time(b) for a, b in pairs) / 1000 for key, pairs in spans.items()}
    return {key: sum(end - begin for begin, end in pairs) for key, pairs in spans.items()}


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
