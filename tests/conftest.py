"""Fixtures of all tests: the back ends of the scan that run on CPUs, a temporary folder that is removed."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from lamamba.ops import native
from lamamba.ops.selective_scan import OP
from tests.networks import BACKENDS


@contextlib.contextmanager
def _compiled_for(name, monkeypatch):
    """The kernels of an instruction set, or a skip where the processor lacks it or it was not built."""
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, name)
    native.load.cache_clear()
    try:
        native.load()
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        monkeypatch.undo()
        native.load.cache_clear()


@pytest.fixture(params=native.INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    with _compiled_for(request.param, monkeypatch):
        yield request.param


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of each back end that runs on CPUs; the compiled one comes once for each of its instruction sets."""
    name, _, instruction_set = request.param.partition("/")
    with _compiled_for(instruction_set, monkeypatch) if instruction_set else contextlib.nullcontext():
        if reason := OP.get(name).unsupported_reason("cpu", torch.float32, 1):
            pytest.skip(reason)
        yield name


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN, so that results that were not written show."""
    torch.use_deterministic_algorithms(True, warn_only=True)                    # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config):
    """One folder for all that tests, launchers, compilers and gradio put into the temporary directory; then it goes.

    Processes of pytest-xdist share that of the process that starts them. Imports already find it.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="lamamba-")                            # short: sockets are made in it
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        # after multiprocessing has removed its own folder in it, at -100
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)


def pytest_collection_modifyitems(items):
    """Tests that slow.txt names have the mark of slow ones."""
    names = set((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in names:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _notes_of_one_test():
    """The command line's log handler stays for the process; each test begins without it."""
    logger = logging.getLogger("lamamba")
    # a fixture of a module may have called the command line
    before, level = [handler for handler in logger.handlers if type(handler).__name__ != "_Notes"], logger.level
    logger.handlers[:] = before
    yield
    logger.handlers[:], logger.level = before, level
