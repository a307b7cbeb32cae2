"""benchmarks/gpu.sh: one line where there is no GPU, and the lower bounds are those of docs/gpu-scan.md."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_is_said_in_one_line(tmp_path):
    done = subprocess.run([BENCHMARKS / "gpu.sh", tmp_path / "r.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no GPU that torch can use here: nothing was measured\n"
    assert not list(tmp_path.iterdir())


def test_the_steps_fit_into_nine_minutes():
    steps = load("gpu").steps(Path("results"))
    assert sum(limit for _, limit, _ in steps.values()) < 9 * 60


def test_a_step_that_fails_or_hangs_is_reported():
    run = load("gpu").run
    assert run([sys.executable, "-c", "print(1)"], 20)["last_lines"] == ["1"]
    assert run([sys.executable, "-c", "1 / 0"], 20)["verdict"] == "failed"
    assert run(["sleep", "9"], 1)["verdict"] == "too slow"


@pytest.mark.parametrize(("what", "n", "bytes_ms", "special_ms"), [
    ("forward", 1, 0.22, 0.14), ("forward", 16, 0.22, 0.82), ("backward", 1, 0.59, 0.32), ("backward", 16, 1.5, 1.7),
])
def test_lower_bounds_are_those_of_the_page(what, n, bytes_ms, special_ms):
    found = load("scan_gpu").lower_bounds(64, 1024, 640, 20, n, what, Namespace(terabytes=4.3, tera_special=3.7))
    assert found["bytes_ms"] == pytest.approx(bytes_ms, rel=0.04)
    assert found["special_ms"] == pytest.approx(special_ms, rel=0.04)
