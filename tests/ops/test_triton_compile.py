"""The machine code of the Triton scan: it compiles for sm_80 and sm_90 without a GPU, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scan_triton_resources.py"


@pytest.fixture(scope="module")
def resources():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--json"], env=environment, capture_output=True, text=True,
        cwd=SCRIPT.parents[1],
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_nothing_spills(resources):
    spilling = [row for row in resources if row["spill_loads"] or row["spill_stores"] or row["stack"]]
    assert {row["arch"] for row in resources} == {"sm_80", "sm_90"}
    assert not spilling, spilling


def test_little_shared_memory_is_needed(resources):
    assert max(row["shared"] for row in resources) <= 48 * 1024


def test_takes_no_more_special_functions_than_planned(resources):
    """Two for softplus and one for each state, for each element; docs/gpu-scan.md."""
    for row in resources:
        if row["kernel"].startswith("walk y, bf16"):
            assert row["loop_special"] <= 3 * row["loop_elements"], row
