"""Progress of long work: one protocol from every function to whoever looks.

Work reports `Progress` values to a function. `reporting` makes that function of what a caller asks for: "auto" (bars on
a terminal or in a notebook, a log line now and then elsewhere), a function of the caller's own, or None.

    with reporting(progress) as report:
        for k, image in enumerate(images):
            ...
            report(Progress("checking", k + 1, len(images)))
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from lamamba.utils.text import shown

logger = logging.getLogger("lamamba")

LOG_SECONDS = 30
"""Between log lines where nobody watches a bar."""


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is."""

    task: str
    """What is being done, in a word or two: "sampling"."""
    done: int
    total: int
    unit: str = "images"
    """What is counted."""
    resumed: int = 0
    """How many of `done` were there before this call; they do not count for the speed."""
    note: str = ""
    """More, in a few words: "loss 0.123", "waiting for other processes"."""


Report = Callable[[Progress], None]
ProgressOption = Report | Literal["auto"] | None
"""What functions with long work take as `progress`."""


def is_watched() -> bool:
    """Whether somebody sees a bar: on a terminal, or in a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell" or bool(sys.stderr and sys.stderr.isatty())


def duration(seconds: float) -> str:
    """A time in the unit that suits it: "38 s", "12 min", "44 h", "5 days"."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 72)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def check_progress(progress: Any) -> None:
    """Check what `reporting` is given, before any work.

    Raises:
        ValueError: for anything but "auto", a function and None.
    """
    if progress is not None and not callable(progress) and not (isinstance(progress, str) and progress == "auto"):
        raise ValueError(f"progress={shown(progress)} must be \"auto\", a function of Progress values, or None")


@contextmanager
def reporting(progress: ProgressOption = "auto") -> Iterator[Report]:
    """A function to report to, for as long as the work goes on.

    Args:
        progress: "auto", a function of `Progress` values, or None to report to nobody.

    Raises:
        ValueError: for anything else.
    """
    check_progress(progress)
    if progress is None:
        yield lambda state: None
    elif callable(progress):
        yield progress
    else:
        lines: _Bars | _LogLines = _Bars() if is_watched() else _LogLines()
        with closing(lines):
            yield lines


class _Bars:
    """A tqdm bar, a new one for each task, also for one that begins again."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task = ""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, state: Progress) -> None:
        if self._bar is None or state.task != self._task or state.done < self._bar.n:
            self.close()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                                 # a notebook without ipywidgets
                from tqdm.auto import tqdm
            self._task, self._bar = state.task, tqdm(
                desc=state.task, total=state.total, initial=state.resumed, unit=f" {state.unit}", dynamic_ncols=True,
                leave=False,
            )
        self._bar.set_postfix_str(state.note, refresh=False)
        self._bar.update(state.done - self._bar.n)


class _LogLines:
    """A log line every half minute, also where a piece of work takes longer than that."""

    def __init__(self) -> None:
        self._state: Progress | None = None
        self._began = self._logged = 0.0
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        self._is_over.set()

    def __call__(self, state: Progress) -> None:
        last, self._state = self._state, state
        if last is None or state.task != last.task or state.done < last.done:   # another task, or it begins again
            self._began = self._logged = time.perf_counter()
        self._log_when_due(state)

    def _watch(self) -> None:
        while not self._is_over.wait(LOG_SECONDS):
            if self._state is not None and self._state.done < self._state.total:
                self._log_when_due(self._state)

    def _log_when_due(self, state: Progress) -> None:
        now = time.perf_counter()
        if now - self._logged < LOG_SECONDS:
            return
        self._logged = now
        rate = (state.done - state.resumed) / (now - self._began)
        left = f"{duration((state.total - state.done) / rate)} left" if rate > 0 else "time left unknown"
        logger.info(
            "%s %d/%d  %.3g %s/s  %s  %s", state.task, state.done, state.total, rate, state.unit, left, state.note
        )
