"""The tests themselves: what `make quick` runs, what a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = (ROOT / "tests" / "quick.txt").read_text(encoding="utf-8").split()


def test_quick_tests_cover_every_package():
    packages = {file.parent.name for file in (ROOT / "lamamba").glob("*/*.py")} - {"_native", "pretrained"}
    assert packages <= {Path(name.split("::")[0]).parts[1] for name in QUICK}


@pytest.mark.parametrize("name", QUICK)
def test_quick_tests_exist(name):
    path, *functions = name.split("::")
    text = (ROOT / path).read_text(encoding="utf-8") if functions else ""
    assert (ROOT / path).exists()
    assert all(f"def {function}(" in text for function in functions)


@pytest.mark.slow
def test_slow_tests_exist():
    """Those of slow.txt, which took longest; a name of none would be run by `make test` again."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-o", "addopts=-q"]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    collected = subprocess.run(command, capture_output=True, text=True, env=outer, cwd=ROOT, check=True).stdout
    slow = (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines()
    assert not set(slow) - set(collected.splitlines())


def test_the_temporary_directory_is_a_folder_that_is_removed_at_the_end():
    """In this process and in those that it starts; see conftest.py."""
    code = "import tempfile; print(tempfile.gettempdir())"
    inner = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert inner == tempfile.gettempdir() == os.environ["TMPDIR"]
    assert Path(inner).name.startswith("lamamba-")


@pytest.mark.slow
def test_a_run_leaves_nothing_in_the_temporary_directory():
    """Of trainings on several processes with their sockets, compiled graphs, folders of images."""
    names = ("training/test_processes.py", "inference/test_conditioning.py", "sampling/test_folder.py")
    files = [str(ROOT / "tests" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    folder = Path(tempfile.mkdtemp())                                           # short: sockets are made below it
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outer, "TMPDIR": str(folder)}                              # a run of its own, not a worker
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")}
    assert left == set()                                                        # that one is made by importing torch
