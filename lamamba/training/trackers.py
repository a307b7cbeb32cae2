"""metrics.jsonl, and TensorBoard and Weights & Biases by accelerate's trackers, whose failures do not stop training."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamamba.options.training import TrainConfig
from lamamba.runs.folder import RunFolder
from lamamba.utils.files import append_json, write_atomically

logger = logging.getLogger("lamamba.training")

WAITING_LINES = 10_000
"""Lines kept for a tracker that does not answer; later ones are dropped."""
FINISH_SECONDS = 10.0
"""How long the end of a run waits for a tracker to write its remaining lines."""


class Tracker:
    """One tracker in a thread of its own, dropped when it raises and abandoned when it hangs.

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
            logger.warning("tracker %s is dropped: %s: %s", self.name, type(error).__name__, error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Queue a line of numbers; never waits."""
        if self._thread.is_alive() and not self._lines.full():
            self._lines.put_nowait((dict(values), step))

    def finish(self) -> None:
        """Wait some seconds for the remaining lines."""
        if not self._lines.full():
            self._lines.put_nowait(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning("tracker %s did not answer in time; metrics.jsonl has everything", self.name)


def start_trackers(names: tuple[str, ...], project: str, folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Start trackers by name; wandb stores the run's configuration, too."""
    def make(name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": folder / "trackers"} if kind.requires_logging_directory else {}
        try:
            tracker = kind(project, **place)
            if hasattr(tracker, "start"):
                tracker.start()
        except ImportError as error:                                            # accelerate's may name another package
            raise ModuleNotFoundError(f"{name} is not installed: pip install 'lamamba-diff[{name}]'") from error
        if name == "wandb":                                                     # TensorBoard would show another run
            tracker.store_init_configuration(dict(config))
        return tracker

    return [Tracker(name, lambda name=name: make(name)) for name in names]


class MetricsFile:
    """metrics.jsonl, a line per logged step, and the trackers; written by rank 0, a no-op on other ranks."""

    def __init__(self, folder: RunFolder, config: TrainConfig, *, is_rank_zero: bool):
        self._folder, self._config, self._is_rank_zero = folder, config, is_rank_zero
        self._trackers: list[Tracker] = []

    def __enter__(self) -> MetricsFile:
        if self._is_rank_zero:
            watch = self._config.watch
            self._trackers = start_trackers(watch.trackers, watch.project, self._folder.path, self._config.to_dict())
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def write(self, line: dict[str, float]) -> None:
        """Append the values of a step; a full disk is logged, not raised."""
        if not self._is_rank_zero:
            return
        try:
            append_json(self._folder.metrics, line)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._folder.metrics, error)
        for tracker in self._trackers:
            tracker.log({key: value for key, value in line.items() if key != "step"}, int(line["step"]))

    def remove_after(self, step: int) -> None:
        """Remove lines of steps that will be repeated."""
        path = self._folder.metrics
        if not self._is_rank_zero or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):           # a line cut off by a kill, or damaged
                continue
        write_atomically(path, "".join(kept))
