"""Scores of all units in a folder, resumable unit by unit and shared by any number of processes.

    FOLDER/scores.json                      the scores, when all units are done
    FOLDER/.unfinished/unit_00003.npz       what removing a unit changes; removed at the end
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamamba.compression.calibration import Calibration
from lamamba.compression.scores import (
    SCORES_VERSION,
    Differences,
    Scores,
    check_units,
    gather,
    measure_unit,
    measure_whole,
)
from lamamba.compression.units import Removable
from lamamba.utils.files import differences_in_words
from lamamba.utils.progress import Report
from lamamba.utils.shards import Note, PlainPlan, ShardedJob

SCORES = "scores.json"


class _Plan(PlainPlan):
    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.values["units"]), 1


class _Job(ShardedJob[_Plan]):
    version, unfinished, result = SCORES_VERSION, ".unfinished", SCORES
    task, what, own, unit = "scoring", "scores", ("",), "units"

    def __init__(
        self, folder: Path, plan: _Plan, network: Removable, calibration: Calibration, criterion: str,
        rank: int, report: Report | None,
    ):
        super().__init__(folder, plan, rank=rank, report=report)
        self._network, self._calibration, self._criterion = network, calibration, criterion
        self._whole, self._energy = measure_whole(network, calibration, criterion)

    def path(self, name: str) -> Path:
        return self.work / name

    def make_shard(self, number: int, advance: Callable[[float], None]) -> tuple[Mapping[str, bytes], Note]:
        unit = self._network.units[number].name
        found = measure_unit(self._network, unit, self._calibration, self._whole, self._criterion)
        content = io.BytesIO()
        np.savez(content, losses=found.losses, kept=np.empty(0) if found.kept is None else found.kept)
        return {_file_name(number): content.getvalue()}, {}

    def finish(self, notes: list[Note]) -> str:
        found = {}
        for number, unit in enumerate(self._network.units):
            with np.load(self.path(_file_name(number))) as arrays:
                found[unit.name] = Differences(arrays["losses"], arrays["kept"])
        return gather(
            self._network, self._criterion, found, self._calibration, self._energy, self.plan.values["about"]
        ).to_json()

    def read_result(self) -> tuple[_Plan, Mapping[int, Note], Mapping[str, list[Any]]]:
        about = dict(Scores.load(self.folder / SCORES).about)
        plan = _Plan({**self.plan.values, "about": about})
        return plan, {number: {"files": {}} for number in range(plan.num_shards)}, {}


def _file_name(number: int) -> str:
    return f"unit_{number:05d}.npz"


def find_scores(folder: Path, about: Mapping[str, Any]) -> Scores | None:
    """The scores in a folder, if there are any.

    Raises:
        ValueError: when they were made otherwise, or are damaged.
    """
    if not (folder / SCORES).is_file():
        return None
    scores = Scores.load(folder / SCORES)
    if found := differences_in_words(dict(scores.about), json.loads(json.dumps(about))):
        raise ValueError(
            f"{folder} holds scores made otherwise ({'; '.join(found)}); repeat the options, or give another folder"
        )
    return scores


def score_in_folder(
    network: Removable, calibration: Calibration, folder: Path, *, criterion: str = "output",
    about: Mapping[str, Any] | None = None, rank: int = 0, report: Report | None = None,
) -> Scores:
    """Score the units that are not scored yet, together with any other processes that do the same.

    Args:
        network: by `find_units`.
        calibration: what to compare on.
        folder: for scores.json.
        criterion: "output" or "task".
        about: teacher and hash, written into the file.
        rank: of this process among those that start together.
        report: called with the progress.

    Raises:
        ValueError: when the folder holds scores made otherwise, or "task" meets a calibration set without data.
        FloatingPointError: when an output is not finite.
        OSError: when the disk is full; units that are done stay.
    """
    check_units(network)
    about = {**calibration.about, **(about or {}), "criterion": criterion}
    if (scores := find_scores(folder, about)) is not None:
        return scores
    plan = _Plan({"units": [unit.name for unit in network.units], "about": json.loads(json.dumps(about))})
    _Job(folder, plan, network, calibration, criterion, rank, report).run()
    return Scores.load(folder / SCORES)
