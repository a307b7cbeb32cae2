"""The machine code of the Triton kernels: they compile for sm_80 and sm_90 without a GPU, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.slow                                                   # minutes of compilation

ROOT = Path(__file__).parents[2]


def compile_all(script: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--quick", "--json"], env=environment, capture_output=True,
        text=True, cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def assert_nothing_spills(resources: list[dict]) -> None:
    spilling = [row for row in resources if row["spill_loads"] or row["spill_stores"] or row["stack"]]
    assert {row["arch"] for row in resources} == {"sm_80", "sm_90"}
    assert not spilling, spilling


@pytest.fixture(scope="module")
def resources():
    return compile_all("scan_triton_resources.py")


def test_nothing_of_the_scan_spills(resources):
    assert_nothing_spills(resources)


def test_nothing_of_the_layers_spills_and_several_programs_share_a_multiprocessor():
    layers = compile_all("layers_triton_resources.py")
    assert_nothing_spills(layers)
    assert max(row["shared"] for row in layers) <= 48 * 1024


def test_little_shared_memory_is_needed(resources):
    assert max(row["shared"] for row in resources) <= 48 * 1024


def test_takes_no_more_special_functions_than_planned(resources):
    """Two for softplus and one for each state, for each element; docs/gpu-scan.md."""
    for row in resources:
        if row["kernel"].startswith("scan y, bf16"):
            assert row["loop_special"] <= 3 * row["loop_elements"], row
