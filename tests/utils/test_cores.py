"""How many cores are free, and when threads wait for each other."""

from __future__ import annotations

import os

import pytest

from lamamba.utils import cores


@pytest.mark.parametrize(("limit", "expected"), [
    ("150000 100000", 1.5), ("max 100000", 8), ("", 8), ("9000000 100000", 8),
])
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="of Linux")
def test_a_container_s_share_counts(tmp_path, monkeypatch, limit, expected):
    monkeypatch.setattr(cores, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(("load", "threads", "fitting"), [
    (0.0, 4, None), (6.0, 1, None), (6.0, 4, 1), (4.0, 4, 2), (80.0, 2, 1), (80.0, 1, None),
])
def test_threads_beyond_the_free_cores_are_named(monkeypatch, load, threads, fitting):
    monkeypatch.setattr(cores, "usable_cores", lambda: 4.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    said = cores.waiting_threads(threads)
    assert (said is None) == (fitting is None)
    assert fitting is None or f"processes.threads={fitting} " in said
