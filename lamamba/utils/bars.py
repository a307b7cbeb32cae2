"""Long work that can be watched: a bar on a terminal, a plain line now and then in a file."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 30
"""Between lines where nobody watches a terminal."""


class WorkBar:
    """How much of a number of things is done, how many in a second, and how long the rest will take."""

    def __init__(self, text: str, total: int, unit: str = "images"):
        self._text, self._total, self._unit = text, total, unit
        self._live = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(), console=Console(stderr=True), disable=not self._live,
        )
        self._task = self._bar.add_task(text, total=total, speed="")
        self._began, self._first, self._told = time.perf_counter(), 0, time.perf_counter()

    def __enter__(self) -> WorkBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, text: str, total: int, unit: str) -> None:
        """Something else is counted from now on."""
        self._text, self._total, self._unit = text, total, unit
        self._began, self._first = time.perf_counter(), 0
        self._bar.reset(self._task, total=total, description=text, speed="")

    def skip(self, done: int) -> None:
        """So much was done before this began: it counts as done, and not for the speed."""
        self._first, self._began = done, time.perf_counter()

    def __call__(self, done: int, note: str = "") -> None:
        seconds = time.perf_counter() - self._began
        rate = (done - self._first) / max(seconds, 1e-9)
        speed = f"{rate:.3g} {self._unit}/s" if rate < 100 else f"{rate:,.0f} {self._unit}/s"
        speed += f"  {note}" if note else ""
        self._bar.update(self._task, completed=done, speed=speed)
        if not self._live and time.perf_counter() - self._told > PLAIN_SECONDS:
            self._told = time.perf_counter()
            left = (self._total - done) / rate if rate > 0 else 0
            print(f"{self._text} {done}/{self._total}  {speed}  {left:.0f} s left", flush=True)
