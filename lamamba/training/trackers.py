"""TensorBoard and Weights & Biases, through accelerate's trackers. Whatever happens to them, training goes on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("lamamba.training")

WAITING_LINES = 10_000
"""Lines kept for a tracker that does not answer; later ones are dropped."""
FAREWELL_SECONDS = 10.0
"""How long the end of a run waits for a tracker to take what is left."""


class Tracker:
    """One tracker in a thread of its own, which is given up when it raises and left behind when it hangs.

    Args:
        name: "tensorboard" or "wandb".
        make: starts it and returns an object with accelerate's log(values, step) and finish().
    """

    def __init__(self, name: str, make: Any):
        self.name = name
        self._lines: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(WAITING_LINES)
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _work(self, make: Any) -> None:
        try:
            tracker = make()
            while (line := self._lines.get()) is not None:
                tracker.log(*line)
            tracker.finish()
        except Exception as error:
            logger.warning("tracker %s is left out from here on: %s: %s", self.name, type(error).__name__, error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand over a line of numbers; never waits."""
        if self._thread.is_alive() and not self._lines.full():
            self._lines.put_nowait((dict(values), step))

    def finish(self) -> None:
        """Let it take what is left, for some seconds."""
        if not self._lines.full():
            self._lines.put_nowait(None)
        self._thread.join(FAREWELL_SECONDS)
        if self._thread.is_alive():
            logger.warning("tracker %s did not answer in time; metrics.jsonl has everything", self.name)


def start_trackers(names: tuple[str, ...], project: str, folder: Path, facts: Mapping[str, Any]) -> list[Tracker]:
    """Start trackers; facts (the run's configuration) are given to those that keep such things."""
    def make(name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(project, logging_dir=folder / "trackers") if kind.requires_logging_directory else kind(project)
        if hasattr(tracker, "start"):
            tracker.start()
        if name == "wandb":                                                     # TensorBoard would show another run
            tracker.store_init_configuration(dict(facts))
        return tracker

    return [Tracker(name, lambda name=name: make(name)) for name in names]
