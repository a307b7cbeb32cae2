"""The machine code of the Triton kernels, compiled as launched: within the budgets of benchmarks/gpu_compile.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.benchmarking.test_gpu_script import load

ROOT = Path(__file__).parents[2]

LOOPS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   MUFU.LG2 R2, R3 ;
        /*0020*/                   MUFU.LG2 R2, R3 ;
.L_x_0:
        /*0030*/                   MUFU.EX2 R2, R3 ;
        /*0040*/                   MUFU.EX2 R2, R3 ;
        /*0050*/                   MUFU.EX2 R2, R3 ;
        /*0060*/                   MUFU.EX2 R2, R3 ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""
"""Two elements an iteration; two of their states in an iteration of the inner loop."""


@pytest.mark.parametrize(("n", "instructions", "special"), [
    (2, (2 + 5 + 1) / 2, (2 + 4) / 2), (16, (2 + 8 * 5 + 1) / 2, (2 + 8 * 4) / 2),
])
def test_the_loop_over_the_states_counts_as_often_as_it_runs(n, instructions, special):
    found = load("gpu_compile").count_instructions(LOOPS, n, elements=2)
    assert found == {"instructions": instructions, "special": special}


def test_the_last_budget_that_fits_counts(monkeypatch):
    compile_ = load("gpu_compile")
    row = {"launch": "scan, cut", "kernel": "k", "case": "c", "dtype": "float32", "n": 4, "arch": 90, "spills": 3}
    budget = compile_.Budget
    for budgets, faults in (
        ([budget("*", "*", None, "spills", 0)], 1),
        ([budget("*", "*", None, "spills", 0), budget("scan", "float32", 4, "spills", 3)], 0),
        ([budget("*", "*", None, "spills", 0), budget("scan", "float32", 1, "spills", 3)], 1),
    ):
        monkeypatch.setattr(compile_, "BUDGETS", budgets)
        assert len(compile_.broken([row])) == faults


@pytest.mark.slow                                                               # minutes of compilation
def test_every_launch_fits_its_budgets(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_compile.py", "--quick", "--json", tmp_path / "found.json"],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("no over budget")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["arch"] for row in found["rows"]} == {80, 90}
    assert {"scan", "scan_backward", "scan, cut", "window_attention_backward", "gated_norm"} <= {
        row["launch"] for row in found["rows"]}
