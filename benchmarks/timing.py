"""What benchmarks on CPUs share: medians of calls in turns, and memory that is kept when it is freed."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

from lamamba.benchmarking.throughput import MALLOC


def medians(
    functions: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each function, called in turns: other load affects all alike. The first turn is not counted.

    Args:
        functions: by name.
        repeats: turns that count.
        clock: time.process_time counts seconds of the processor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            began = clock()
            function()
            if turn:
                seconds[name].append(clock() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def keep_freed_memory() -> None:
    """On Linux, start this program again with MALLOC, unless it has been: page faults are slow on virtual machines."""
    if sys.platform == "linux" and any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
