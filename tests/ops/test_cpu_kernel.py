"""The compiled CPU kernels: accuracy, threads and floating-point mode of the process, and running without them."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lamamba.ops import native, selective_scan, use_backend
from lamamba.ops.selective_scan import OP
from tests.ops.test_selective_scan import make_inputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh_library():
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def run_python(program: str) -> str:
    """The output of a new Python process, which must end within two minutes."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
                          timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def scan_of_steps(s: torch.Tensor, A: float = -1.0) -> torch.Tensor:
    """Two tokens 1 and 0 whose step is softplus(s), one channel for each s; y = (delta, exp(delta A) delta)."""
    c = len(s)
    ones = torch.ones(1, 2, 1, 1)
    return selective_scan(
        torch.tensor([1.0, 0.0])[None, :, None].expand(1, 2, c), ones, ones, ones, torch.zeros(1, c, 1), s[None],
        torch.full((1, c, 1), A), torch.zeros(1, c), torch.tensor([[0, 1]]), backend="cpu",
    )[0]


def units_in_the_last_place(result: torch.Tensor, exact: torch.Tensor) -> np.ndarray:
    return np.abs(result.double().numpy() - exact.numpy()) / np.spacing(np.abs(exact.float().numpy()))


def test_softplus_is_accurate_to_two_units_in_the_last_place(instruction_set):
    s = torch.cat([torch.linspace(-80, 80, 100_003), torch.linspace(-1, 1, 20_001), torch.tensor([0.0, 1e-30, 1e30])])
    exact = torch.logaddexp(s.double(), torch.zeros(()).double())
    assert units_in_the_last_place(scan_of_steps(s)[0], exact).max() < 2


def test_decay_is_as_accurate_as_its_rounded_exponent(instruction_set):
    """Rounding delta A costs up to 1.3 |delta A| units: few where the decay matters, many only where it is almost 0."""
    s = torch.linspace(-30, 80, 100_003)
    delta, later = scan_of_steps(s)
    exact = torch.exp(-delta.double()) * delta.double()
    assert (units_in_the_last_place(later, exact) < 2.5 + 1.3 * delta.numpy()).all()
    assert (scan_of_steps(s, A=-1e6)[1] >= 0).all(), "a decay below float32's range must be 0"


@pytest.mark.parametrize("s", [math.nan, math.inf, -math.inf])
def test_softplus_of_nan_and_infinity(instruction_set, s):
    delta = scan_of_steps(torch.tensor([s]))[0].item()
    assert delta == pytest.approx(torch.nn.functional.softplus(torch.tensor(s)).item(), nan_ok=True, abs=1e-30)


def test_loading_leaves_the_floating_point_mode_alone(instruction_set):
    scan_of_steps(torch.zeros(5))
    tiny = np.float32(1e-39)
    assert tiny * np.float32(0.5) > 0, "denormal numbers are flushed to zero"


def test_unsupported_inputs_raise():
    inputs = make_inputs(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="computes in float32"):
        selective_scan(**inputs, backend="cpu")
    assert OP.choose(inputs["x"], 1) == "torch"
    assert OP.choose(inputs["x"].float(), 1) == "cpu"


def test_paths_outside_the_grid_raise():
    for outside in (-1, 16):
        inputs = make_inputs()
        inputs["paths"] = inputs["paths"].clone()
        inputs["paths"][2, 3] = outside
        with pytest.raises(ValueError, match=r"outside 0 \.\. 15"):
            selective_scan(**inputs, backend="cpu")


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "avx51")
    with pytest.raises(ValueError, match="did you mean 'avx512'"):
        native.load()


def test_an_instruction_set_that_the_processor_lacks_raises(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "avx512")
    monkeypatch.setattr(native, "supported_instruction_sets", lambda: ("avx2", "baseline"))
    with pytest.raises(RuntimeError, match="runs only avx2, baseline"):
        selective_scan(**make_inputs())


def test_takes_the_best_instruction_set_that_was_built(monkeypatch, tmp_path):
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(native, "supported_instruction_sets", lambda: native.INSTRUCTION_SETS)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    for name in ("baseline", "avx2"):
        (tmp_path / f"kernels_{name}{native.SUFFIX}").touch()
        assert native.choose_instruction_set() == name


def test_without_its_libraries_pytorch_runs_and_warns_once(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    inputs = make_inputs()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(selective_scan(**inputs), selective_scan(**inputs, backend="reference"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without its compiled CPU kernels" in caplog.text
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"install a C\+\+17 compiler"):
        selective_scan(**inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shares_the_threads_of_torch():
    runtimes = run_python("""
        import torch
        from lamamba.ops import native
        from tests.ops.test_selective_scan import make_inputs, selective_scan
        torch.set_num_threads(2)
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        tasks = len(__import__("os").listdir("/proc/self/task"))
        selective_scan(**make_inputs(b=8, height=16, width=16, c=128), backend="cpu")
        assert len(__import__("os").listdir("/proc/self/task")) == tasks, "it started threads of its own"
        files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        print(*(file for file in files if any(name in file for name in ("libgomp", "libomp", "libiomp"))))
    """)
    assert len(runtimes.split()) == 1, runtimes


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_runs_in_a_forked_child():
    run_python("""
        import os
        import torch
        from tests.ops.test_selective_scan import make_inputs, selective_scan
        torch.set_num_threads(2)
        inputs = make_inputs(b=8, height=16, width=16, c=128)
        before = selective_scan(**inputs, backend="cpu")
        child = os.fork()
        if child == 0:
            after = selective_scan(**inputs, backend="cpu")
            os._exit(0 if (after.numpy() == before.numpy()).all() else 1)       # torch.equal itself would hang here
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_runs_in_several_python_threads_at_once():
    inputs = [make_inputs(b=2, height=8, width=8, c=70, n=2, seed=seed) for seed in range(8)]
    expected = [selective_scan(**each, backend="cpu") for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda each: selective_scan(**each, backend="cpu"), inputs)
            assert all(torch.equal(result, each) for result, each in zip(results, expected, strict=True))


def test_describes_itself(instruction_set):
    assert instruction_set in native.describe()
