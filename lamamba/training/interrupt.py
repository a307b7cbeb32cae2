"""Signals that ask a run to stop: it finishes its step, writes a checkpoint, and ends with a status of its own."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger("lamamba.training")

EXIT_INTERRUPTED = 75
"""The exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL: try again later)."""

SIGNALS = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Interrupted(Exception):
    """The run was asked to stop and has written a checkpoint; the same command resumes it."""

    def __init__(self, name: str, step: int, checkpoint: Path | None):
        self.name, self.step, self.checkpoint = name, step, checkpoint
        super().__init__(f"{name}: stopped after step {step}; run the same command again to resume from {checkpoint}")


class StopRequest:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._is_interrupted = False

    def take(self, number: int, frame: Any) -> None:
        """Remember the first signal; later ones, as during the save, change nothing.

        Raises:
            KeyboardInterrupt: for a second Ctrl-C, from somebody who does not want to wait for a checkpoint.
        """
        if number == signal.SIGINT:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self._is_interrupted = True
            logger.warning("Ctrl-C: stopping after this step, with a checkpoint; once more stops at once, without one")
        self.name = self.name or signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Take SIGTERM, SIGUSR1 and Ctrl-C as requests to stop (signals reach main threads only).

    Afterwards they mean what they meant before; but after a request the first two are ignored, so that one more does
    not take the exit status from a process that is about to end.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request.take) for number in map(_number, SIGNALS)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            is_over = request.name is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_over else handler)


def ignore_in_worker() -> None:
    """Leave signals to the training process: schedulers send them to all processes of a job."""
    for number in map(_number, SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def _number(name: str) -> signal.Signals:
    return signal.Signals[name]
