"""Stop signals: the run finishes its step, writes a checkpoint, and ends with exit status 75."""

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
"""Exit status of a run that a signal stopped and that can be resumed (EX_TEMPFAIL)."""

SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Interrupted(Exception):
    """A signal stopped the run, after a checkpoint; the same command or call resumes it."""

    def __init__(self, name: str, step: int, checkpoint: Path | None):
        self.name, self.step, self.checkpoint = name, step, checkpoint
        super().__init__(f"{name}: stopped after step {step}; run the same command again to resume from {checkpoint}")


class StopRequest:
    """The first stop signal that this process has received, if any."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._is_interrupted = False

    def take(self, number: int, frame: Any) -> None:
        """Signal handler: keep the first signal; later ones, as during the save, change nothing.

        Raises:
            KeyboardInterrupt: for a second Ctrl-C: stop at once, without a checkpoint.
        """
        if number == signal.SIGINT:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self._is_interrupted = True
            logger.warning("Ctrl-C: stopping after this step, with a checkpoint; once more stops at once, without one")
        self.name = self.name or signal.Signals(number).name


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handle SIGTERM, SIGUSR1 and Ctrl-C as stop requests (in main threads, which alone receive signals).

    The former handlers are restored at the end; but after a request the first two signals are ignored, so that one more
    does not change the exit status.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request.take) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            is_over = request.name is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_over else handler)


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a data worker, by its number: schedulers send them to all processes of a job."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
