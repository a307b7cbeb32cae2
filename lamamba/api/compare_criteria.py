"""lamamba.compare_criteria: loss and distance over the removed share by criterion, and how far additivity holds."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamamba.api.compress import Teacher, calibrate, open_teacher
from lamamba.api.evaluate import evaluate
from lamamba.compression.additivity import SetLoss, measure_sets, rank_correlation, relative_loss
from lamamba.compression.calibration import Calibration
from lamamba.compression.folder import write_pruned
from lamamba.compression.job import score_in_folder
from lamamba.compression.pictures import draw_additivity, draw_criteria
from lamamba.compression.plan import Plan, check_share, in_order, make_plan
from lamamba.compression.scores import RULES, Scores, by_rule
from lamamba.options.base import from_dict, record, verb
from lamamba.options.compress import CompareCriteriaOptions, Criterion
from lamamba.options.evaluation import EvaluateOptions
from lamamba.utils.distributed import launched_processes, local_device
from lamamba.utils.files import check_folder, read_json, write_json
from lamamba.utils.progress import Progress, ProgressOption, Report, reporting

logger = logging.getLogger("lamamba.api")

COMPARE_VERSION = 1
LABELS = {"frechet": "Fréchet distance, guidance 1", "accuracy": "recognised"}
"""Figures of samples that are drawn."""


@dataclass(frozen=True)
class CompareCriteriaResult:
    """Losses and figures of pruned networks, and of sets of units."""

    points: tuple[Mapping[str, Any], ...]
    """One for each criterion, share, draw: "criterion", "share", "loss", and figures of its samples."""
    whole: Mapping[str, float]
    """Figures of the whole network."""
    sets: tuple[SetLoss, ...] = field(repr=False)
    """Predicted and measured losses of sets of units."""
    path: Path
    """compare.json."""
    pictures: tuple[Path, ...]

    @property
    def rank_correlation(self) -> float | None:
        """Of predicted and measured losses over sensible sets."""
        sensible = [each for each in self.sets if each.kind == "sensible"]
        return rank_correlation(sensible) if len(sensible) > 2 else None

    def __str__(self) -> str:
        figures = [name for name in LABELS if any(name in point for point in self.points)]
        lines = [f"{'criterion':<12}{'removed':>9}{'loss':>11}" + "".join(f"{name:>12}" for name in figures)]
        if self.whole:
            lines.append(f"{'whole':<12}{0:>9.0%}{0:>11}" + "".join(f"{self.whole[name]:>12.3f}" for name in figures))
        lines += [
            f"{point['criterion']:<12}{point['share']:>9.1%}{point['loss']:>11.3g}"
            + "".join(f"{point[name]:>12.3f}" for name in figures if name in point)
            for point in self.points
        ]
        if self.rank_correlation is not None:
            lines.append(f"rank correlation of predicted and measured loss, sensible sets: {self.rank_correlation:.3f}")
        return "\n".join([*lines, ", ".join(map(str, (self.path, *self.pictures)))])

    def _repr_png_(self) -> bytes:
        return self.pictures[0].read_bytes()


@verb
def compare_criteria(options: CompareCriteriaOptions, *, progress: ProgressOption = "auto") -> CompareCriteriaResult:
    """Prune a network by several criteria at several shares; measure losses and, with a reference, its samples.

    What OUT/compare.json holds already is not measured again.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError, OSError: as `score_units` and `evaluate` do.
    """
    out = options.out
    check_folder(out)
    if launched_processes() > 1:
        raise ValueError("compare runs in one process; score with several (lamamba.score_units), then compare")
    teacher = open_teacher(options.model, local_device(options.device))
    check_share(teacher.units, min(options.shares, default=0))                  # or refuse now
    held_out = calibrate(teacher, options, held_out=True)
    with reporting(progress) as report:
        table = _Table(out / "compare.json", {**teacher.about(), **held_out.about})
        work = _Comparison(options, teacher, held_out, table)
        whole = work.figures("samples of the whole network", None, report)
        cases = list(work.cases(report))
        measured = []
        for number, (key, criterion, plan) in enumerate(cases):
            report(Progress("comparing", number, len(cases), unit="networks", note=key))
            measured.append(work.measure(key, criterion, plan, report))
        sets = work.sets(report)
    points = tuple(measured)
    pictures = [out / "criteria.png"]
    curves = {str(name): [point for point in points if point["criterion"] == name] for name in options.criteria}
    known = {name: label for name, label in LABELS.items() if any(name in point for point in points)}
    draw_criteria(curves, pictures[0], labels=known, whole=whole)
    if sets:
        pictures.append(out / "additivity.png")
        draw_additivity(sets, pictures[1])
    return CompareCriteriaResult(points, whole, tuple(sets), table.path, tuple(pictures))


@record
class _Loss:
    criterion: Criterion
    share: float
    multiply_adds: float
    loss: float
    predicted: float | None
    predicted_with_cross_terms: float | None
    removed: tuple[str, ...]


@record
class _Figures:
    figures: dict[str, float]


@record
class _Sets:
    sets: tuple[SetLoss, ...]


def _check_entry(key: str, value: Any, path: Path) -> None:
    """Check an entry of compare.json: sets, figures of samples, or the loss of a pruned network."""
    where = f"{path} is damaged, remove it to measure again: {key!r}"
    if key == "sets":
        from_dict(_Sets, {"sets": value}, where)
    elif key.startswith("samples of "):
        from_dict(_Figures, {"figures": value}, where)
    elif not key.startswith(f"{from_dict(_Loss, value, where).criterion} "):
        raise ValueError(f"{where}: criterion={value['criterion']!r} is of another entry")


class _Table:
    """compare.json: what was measured, by key; written after every measurement."""

    def __init__(self, path: Path, about: Mapping[str, Any]):
        self.path, self._about, self.entries = path, json.loads(json.dumps(about)), dict[str, Any]()
        if path.is_file():
            values = read_json(path, COMPARE_VERSION)
            if values.get("about") != self._about:
                raise ValueError(f"{path} compares another network or other samples; give another folder as out")
            if not isinstance(entries := values.get("entries"), dict):
                raise ValueError(f"{path} is damaged: it has no entries; remove it to measure again")
            for key, value in entries.items():
                _check_entry(key, value, path)
            self.entries = entries

    def put(self, key: str, value: Any) -> Any:
        self.entries[key] = json.loads(json.dumps(value))
        write_json(self.path, {"version": COMPARE_VERSION, "about": self._about, "entries": self.entries})
        return self.entries[key]


@dataclass(frozen=True)
class _Comparison:
    """A network and what it is compared by."""

    options: CompareCriteriaOptions
    teacher: Teacher
    held_out: Calibration
    table: _Table

    def scores(self, criterion: str, report: Report, seed: int = 0) -> Scores:
        if criterion in RULES:
            return by_rule(self.teacher.units, criterion, seed, self.teacher.about())
        return score_in_folder(
            self.teacher.units, calibrate(self.teacher, self.options), self.options.out / f"scores_{criterion}",
            criterion=criterion, about=self.teacher.about(), report=report,
        )

    def cases(self, report: Report) -> Iterator[tuple[str, str, Plan]]:
        """Every pruned network: a key, its criterion, and its plan."""
        for criterion in dict.fromkeys(self.options.criteria):
            draws = self.options.random_draws if criterion == "random" else 1
            for draw in range(draws):
                scores = self.scores(criterion, report, self.options.seed + draw)
                for share in dict.fromkeys(self.options.shares):
                    make = in_order if criterion in ("hand", "random") else make_plan
                    try:
                        plan = make(scores, remove=share)
                    except ValueError as error:                                 # beyond what this criterion can remove
                        logger.warning("%s: %s; the point is missing", criterion, error)
                        continue
                    yield f"{criterion} {share:g} {draw}", criterion, plan

    def measure(self, key: str, criterion: str, plan: Plan, report: Report) -> dict[str, Any]:
        """Loss and figures of one pruned network."""
        if key not in self.table.entries:
            self.table.put(key, {
                "criterion": criterion, "share": plan.parameters, "multiply_adds": plan.multiply_adds,
                "loss": relative_loss(self.teacher.units, plan.removed, self.held_out), "predicted": plan.predicted,
                "predicted_with_cross_terms": plan.predicted_with_cross_terms, "removed": plan.removed,
            })
        return {**self.table.entries[key], **self.figures(f"samples of {key}", plan, report)}

    def figures(self, key: str, plan: Plan | None, report: Report) -> dict[str, float]:
        """Distance and others of samples of the network without the plan's units; {} without a reference."""
        options = self.options
        if options.reference is None:
            return {}
        key = f"{key}: {options.num_images} images x {options.repeats}, {options.features}, {options.reference}"
        if key in self.table.entries:
            return self.table.entries[key]
        folder, source = options.out / ".network", options.model
        if plan is not None:
            shutil.rmtree(folder, ignore_errors=True)
            pruned = self.teacher.units.without(plan.removed)
            write_pruned(folder, pruned, self.teacher.metadata, plan, None)
            source = str(folder)
        result = evaluate(EvaluateOptions(
            samples=source, reference=options.reference, features=options.features, num_images=options.num_images,
            repeats=options.repeats, out=options.out / ".evaluation.json", device=options.device,
        ), progress=report)
        entry = result.entries[0]
        shutil.rmtree(folder, ignore_errors=True)
        for left in options.out.glob(".evaluation*"):
            left.unlink()
        spread = {f"{name}_spread": value for name, value in entry.spread.items() if name in LABELS}
        figures = {name: entry.figures[name] for name in LABELS if name in entry.figures}
        return self.table.put(key, {**figures, **spread})

    def sets(self, report: Report) -> list[SetLoss]:
        if not self.options.sets:
            return []
        found: list[Any] = self.table.entries.get("sets", [])
        for each in measure_sets(
            self.teacher.units, self.scores("output", report), self.held_out, sets=self.options.sets, first=len(found),
            report=report,
        ):
            found = self.table.put("sets", [*found, dataclasses.asdict(each)])
        return [SetLoss(**each) for each in found[: self.options.sets]]
