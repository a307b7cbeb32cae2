"""Cores of this machine, and how many of them other programs leave free."""

from __future__ import annotations

import os
from pathlib import Path

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of computing time, or "max", and in how many."""


def usable_cores() -> float:
    """Cores that the system lets this process use, a container's share among them."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        time, period = CPU_LIMIT.read_text(encoding="utf-8").split()
        return min(cores, int(time) / int(period))
    except (OSError, ValueError):                                               # no container, or no limit
        return cores


def free_cores() -> float:
    """Those of them that other programs have left free in the last minute; all of them where that is unknown."""
    if not hasattr(os, "getloadavg"):
        return usable_cores()
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return usable_cores() * max(0.0, 1 - busy)


def waiting_threads(threads: int) -> str | None:
    """What to do where a computation has more threads than there are free cores; None where it has not.

    Threads of one computation wait for the slowest of them: a core shared with another program delays all.
    """
    fitting = max(1, round(free_cores()))
    if threads <= fitting:
        return None
    return (
        f"{threads} threads compute, and of {usable_cores():.3g} cores about {fitting} "
        f"{'is' if fitting == 1 else 'are'} free: they wait for each other. processes.threads={fitting} may well be "
        "faster (--threads on the command line)"
    )
