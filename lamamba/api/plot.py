"""lamamba.plot: loss, gradient norm, speed and quick scores of runs as one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamamba.options.base import verb
from lamamba.options.plot import PlotOptions
from lamamba.utils.files import check_target, read_json
from lamamba.utils.text import shown
from lamamba.viz.curves import SCORES, read_metrics, run_curves


@dataclass(frozen=True)
class PlotResult:
    """A picture of runs."""

    path: Path
    """The PNG."""
    last_steps: dict[str, int]
    """The last logged step of each run, by its folder."""
    png: bytes = field(repr=False)
    """What the file holds."""
    note: str | None = None
    """Why the losses of the runs cannot be compared, where they cannot; the picture says it, too."""

    def __str__(self) -> str:
        note = f"{self.note}\n" if self.note else ""
        return f"{note}{self.path}: " + ", ".join(f"{run} to step {step}" for run, step in self.last_steps.items())

    def _repr_png_(self) -> bytes:
        return self.png


@verb
def plot(options: PlotOptions) -> PlotResult:
    """Draw loss, gradient norm, images per second and quick scores of runs over their optimizer steps.

    Raises:
        FileNotFoundError: when a run has no metrics.jsonl.
        ValueError: when it has no lines yet, or others than a run's, or its config.json is damaged.
    """
    check_target(options.out)
    metrics, scores, losses = {}, {}, []
    for run in options.runs:
        path = run if run.suffix == ".jsonl" else run / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{run} has no metrics.jsonl; give the folder of a run that has begun")
        metrics[str(run)] = read_metrics(path)
        place = path.parent / "scores.jsonl"
        if place.is_file() and (found := read_metrics(place, SCORES, may_be_empty=True)):
            scores[str(run)] = found
        if (path.parent / "config.json").is_file():
            losses.append(_loss(path.parent / "config.json"))
    note = _incomparable(losses)
    run_curves(metrics, options.out, options.smooth, scores, note)
    last_steps = {run: lines[-1]["step"] for run, lines in metrics.items()}
    return PlotResult(options.out, last_steps, options.out.read_bytes(), note)


def _loss(path: Path) -> dict[str, Any]:
    """What a run's loss depends on besides its network, from its config.json.

    Raises:
        ValueError: when it is damaged.
    """
    def section(values: dict[str, Any], name: str) -> dict[str, Any]:
        found = {} if values.get(name) is None else values[name]
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged: {name}={shown(found)} must be named values")
        return found

    config = read_json(path)
    loss = {"timesteps": None, "weighting": "none", **section(section(config, "train"), "loss")}
    return {
        "objective": section(config, "architecture").get("objective"), "weighting": loss["weighting"],
        "drawing of times": loss["timesteps"],
        "data": (section(config, "data").get("fingerprint"), section(config, "sampling").get("scale")),
    }


def _incomparable(losses: list[dict[str, Any]]) -> str | None:
    """Why losses cannot be compared; None where they can."""
    different = []
    for name in losses[0] if losses else ():
        values = {str(loss[name]) for loss in losses}
        if len(values) > 1:
            different.append(name if name == "data" else f"{name} ({', '.join(sorted(values))})")
    return f"losses cannot be compared: the runs differ in {', '.join(different)}" if different else None
