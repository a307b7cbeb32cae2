"""Building the compiled kernels from source, with every kind of compiler and with none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamamba.ops import native, selective_scan
from tests.ops.test_selective_scan import check_against_float64, make_inputs

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.py needs."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77")
    if not (ROOT / "setup.py").exists():
        pytest.skip("these tests need the source tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lamamba/csrc", "lamamba/_version.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--build-lib", "out"], cwd=checkout,
                          env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False)


def test_every_file_of_the_package_is_installed(checkout):
    """Recipes, class names, the classifier of digits and the model that comes with the package among them."""
    ignore = shutil.ignore_patterns("__pycache__", f"*{native.SUFFIX}")
    shutil.copytree(ROOT / "lamamba", checkout / "lamamba", ignore=ignore, dirs_exist_ok=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", "out"], cwd=checkout,
                   capture_output=True, timeout=120, check=True)
    left_out = checkout / "lamamba/csrc"
    own = {path.relative_to(checkout) for path in checkout.glob("lamamba/**/*")
           if path.is_file() and left_out not in path.parents}
    installed = {path.relative_to(checkout / "out") for path in checkout.glob("out/**/*") if path.is_file()}
    assert own == installed


NO_COMPILER = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc", "LDSHARED": "/nowhere/cc", "LDCXXSHARED": "/nowhere/c++"}


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is not chosen by CXX there")
def test_without_a_compiler_the_build_goes_on_and_says_so(checkout):
    done = build(checkout, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "could not build the CPU kernels" in done.stderr
    assert "install it again to get them" in done.stderr
    assert not list((checkout / "out").rglob(f"kernels_*{native.SUFFIX}"))


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is not chosen by CXX there")
def test_a_wheel_for_others_is_not_built_without_kernels(checkout):
    assert build(checkout, **NO_COMPILER, LAMAMBA_REQUIRE_KERNELS="1").returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="needs GCC or Clang")
@pytest.mark.parametrize("flags", [["-DLAMAMBA_PLAIN_ARRAYS"], ["-DLAMAMBA_PLAIN_ARRAYS", "-fopenmp"]],
                         ids=["no vector types", "no vector types, own OpenMP"])
def test_other_compilers_get_the_same_kernel(tmp_path, monkeypatch, flags):
    """The code for compilers without vector types, and without torch's OpenMP, built by the compiler at hand."""
    sources, library = sorted((ROOT / "lamamba/csrc").glob("*.cpp")), tmp_path / f"kernels_baseline{native.SUFFIX}"
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", *flags, *map(str, sources), "-o", str(library)],
                   check=True, timeout=120)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    native.load.cache_clear()
    try:
        inputs = make_inputs(b=3, height=7, width=5, c=37, n=3, r=5)
        check_against_float64(inputs, "cpu")
        monkeypatch.setattr(native, "num_threads", lambda: 3)
        torch.testing.assert_close(selective_scan(**inputs, backend="cpu"), selective_scan(**inputs, backend="torch"))
    finally:
        native.load.cache_clear()
