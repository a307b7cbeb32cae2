"""Data workers: whatever ends them or the job, the job ends, with one clear line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

import pytest

from lamamba.data.images import BadImage
from lamamba.training.loop import train
from tests.training.together import FewDigits, config, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks workers")


class Failing(FewDigits):
    """Raises, or dies by a signal, in workers alone."""

    def __init__(self, fault):
        super().__init__(4)
        self._fault, self._process = fault, os.getpid()

    def read(self, indices):
        if os.getpid() != self._process and isinstance(self._fault, signal.Signals):
            os.kill(os.getpid(), self._fault)
        if os.getpid() != self._process and self._fault is not None:
            raise self._fault
        return super().read(indices)


def train_with_workers(folder, fault, in_callback):
    def raise_in_callback(state):
        if in_callback is not None:
            raise in_callback

    multiprocessing.set_start_method("fork", force=True)
    train(config(processes=dict(data_workers=2)), Failing(fault), folder, [raise_in_callback])


@pytest.mark.parametrize(("fault", "in_callback", "kind", "said"), [
    (ValueError("11 files are bad"), None, ValueError, "11 files are bad"),
    (BadImage("empty", "0 bytes"), None, ValueError, "empty: 0 bytes"),
    (OSError(5, "broken disk"), None, OSError, "[Errno 5] broken disk"),
    (signal.SIGKILL, None, RuntimeError, "a process that reads data has died (status -9"),
    (KeyError("a bug"), None, KeyError, "Original Traceback"),
    (None, ZeroDivisionError("elsewhere"), ZeroDivisionError, "elsewhere"),
    (None, KeyboardInterrupt(), KeyboardInterrupt, ""),
], ids=lambda value: type(value).__name__)
def test_a_job_with_workers_ends(tmp_path, fault, in_callback, kind, said):
    process, results = start(train_with_workers, tmp_path, fault, in_callback)
    _, is_well, (raised, text, _) = results.get(timeout=60)
    process.join(30)                                                            # its exit ends and joins its workers
    alive, _ = process.is_alive(), process.kill()
    assert (is_well, raised, alive, process.exitcode) == (False, kind, False, 1)
    assert said in text
    if kind is not KeyError:
        assert "\n" not in text
