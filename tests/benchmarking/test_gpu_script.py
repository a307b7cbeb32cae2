"""benchmarks/gpu.sh: what it says without a GPU or a package, its steps in a dry run, its table and picture."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable}                              # the Python that the script runs


def load(name):
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_is_said_in_one_line(tmp_path):
    done = subprocess.run([BENCHMARKS / "gpu.sh", tmp_path / "r.json"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no GPU that torch can use here: nothing was measured\n"
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named():
    gpu = load("gpu")
    assert gpu.missing_modules(("json", "no_such_module", "sys")) == ["no_such_module"]


def test_the_wheels_to_carry_are_those_that_are_imported():
    carried = (BENCHMARKS / "gpu.sh").read_text().split("#     diffusers ", 1)[1].split("\n", 1)[0].split()
    assert {name.replace("-", "_") for name in carried} <= set(load("gpu").MODULES)


def test_the_steps_fit_into_nine_minutes():
    steps = load("gpu").steps(Path("results"))
    assert sum(step.limit for step in steps.values()) < 9 * 60


def test_a_step_that_fails_or_hangs_is_reported_with_what_it_wrote(tmp_path):
    gpu, file = load("gpu"), tmp_path / "rows.json"
    assert gpu.run(gpu.Step([sys.executable, "-c", "print(1)"], 20))["last_lines"] == ["1"]
    assert gpu.run(gpu.Step([sys.executable, "-c", "1 / 0"], 20))["verdict"] == "failed"
    hangs = f"import time; open({str(file)!r}, 'w').write('[1]'); time.sleep(9)"
    outcome = gpu.run(gpu.Step([sys.executable, "-c", hangs], 2, file))
    assert (outcome["verdict"], outcome["result"]) == ("too slow", [1])


@pytest.mark.parametrize(("what", "n", "bytes_ms", "special_ms"), [
    ("forward", 1, 0.22, 0.14), ("forward", 16, 0.22, 0.82), ("backward", 1, 0.59, 0.32), ("backward", 16, 1.5, 1.7),
])
def test_lower_bounds_are_those_of_the_page(what, n, bytes_ms, special_ms):
    found = load("scan_gpu").lower_bounds(64, 1024, 640, 20, n, what, Namespace(terabytes=4.3, tera_special=3.7))
    assert found["bytes_ms"] == pytest.approx(bytes_ms, rel=0.04)
    assert found["special_ms"] == pytest.approx(special_ms, rel=0.04)


def results(networks):
    step = {"verdict": "passed", "seconds": 1.0, "last_lines": []}
    return {
        "device": "GPU", "versions": {"torch": "2.11"}, "date": "today", "commit": "abc",
        "steps": {"tests": {**step, "verdict": "failed", "last_lines": ["2 failed"]},
                  "networks": {**step, "result": {"rows": networks}}},
    }


def row(network, way, ms, size=256, mode="forward", **more):
    return {"network": network, "image_size": size, "images": 4, "mode": mode, "way": way, "ms": ms,
            "images_per_second": 4000 / ms, "peak_memory_bytes": 2**31, **more}


def test_the_table_has_a_line_for_each_size_and_compares_the_fastest_ways():
    report = load("gpu_report")
    page = report.markdown(results([
        row("xl", "eager", 30.0, kernels=[{"kernel": "walk", "ms": 9.0, "calls": 22}]), row("xl", "graphed", 20.0),
        row("dit-xl-2", "compiled", 50.0), row("xl", "train", 90.0, mode="train"),
        {"network": "dit-xl-2", "image_size": 512, "images": 4, "mode": "forward", "error": "not ready after 120 s"},
    ]))
    lines = page.splitlines()
    assert "| forward | 256 | 4 | 30.0 |  | 20.0 |  | 50.0 |  | 2.50 | 2.0 | 2.0 |" in lines
    assert "| training step | 256 | 4 | 90.0 |  |  |  |  |  |  | 2.0 |  |" in lines
    assert "- tests: failed, 1 s: 2 failed" in lines
    assert "- dit-xl-2, 512 px, forward: not ready after 120 s" in lines
    assert "- kernel of xl, 256 px, eager: 9.00 ms in 22 calls of `walk`" in lines


@pytest.mark.parametrize("networks", [[], [row("xl", "eager", 30.0, kernels=[{"kernel": "k", "ms": 9.0, "calls": 1}])]])
def test_the_picture_is_drawn_from_whatever_there_is(networks, tmp_path):
    load("gpu_report").write_report(results(networks), tmp_path / "gpu.json")
    with Image.open(tmp_path / "gpu.png") as image:
        assert image.format == "PNG"
    assert (tmp_path / "gpu.md").read_text().startswith("# GPU")


def test_the_roofline_takes_the_longest_of_what_a_kernel_must_do():
    pytest.importorskip("triton", reason="triton is not installed")
    roofline = load("gpu_roofline")
    device = roofline.DEVICES["h100"]
    lanes = device.multiprocessors * device.clock
    assert roofline.Work("memory", device.bandwidth).seconds(device) == 1 / roofline.MEMORY
    assert roofline.Work("products", 1, device.bfloat16).seconds(device) == 1 / roofline.PRODUCTS
    assert roofline.Work("scan", 1, 0, 128 * lanes, 1).seconds(device) == pytest.approx(1 / roofline.ISSUE)
    assert roofline.Work("scan", 1, 0, 0, 16 * lanes).seconds(device) == pytest.approx(1)


def test_the_rooflines_products_are_those_of_the_operation_counts():
    pytest.importorskip("triton", reason="triton is not installed")
    from lamamba.benchmarking.flops import lamamba_operations
    from lamamba.benchmarking.peers.registry import peer_operations
    from lamamba.config import UNetConfig

    roofline = load("gpu_roofline")
    counts = {640: (50.0, 3.0), 1280: (50.0, 3.0), 2560: (50.0, 3.0)}
    work = {"lamamba": roofline.lamamba(256, 2, counts), "dit": roofline.dit(256, 2)}
    whole = {"lamamba": lamamba_operations(UNetConfig.preset("xl", image_size=256)).matrix,
             "dit": peer_operations("dit-xl-2", 256).matrix}
    for name, kernels in work.items():
        operations = sum(kernel.operations for kernel in kernels)
        assert operations == pytest.approx(2 * 2 * whole[name], rel=0.05), name     # conditioning is not in the passes


@pytest.mark.slow                                                               # every script once, most interpreted
@pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_dry_run_takes_every_step(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run([BENCHMARKS / "gpu.sh", "--dry-run", tmp_path / "r.json"], capture_output=True, text=True,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "r.json").read_text())
    assert list(found["steps"]) == ["compile", "tests", "scan", "networks", "layers"]
    assert all(step["verdict"] == "passed" for step in found["steps"].values())
    rows = found["steps"]["networks"]["result"]["rows"]
    ways = ("eager", "compiled", "graphed")
    assert [(row["network"], row["way"]) for row in rows] == [
        *(("xl", way) for way in ways), *(("dit-xl-2", way) for way in ways), ("xl", "train")]
    assert {"r.json", "r.md", "r.png"} == {path.name for path in tmp_path.iterdir()}
