"""lamamba.plot: loss, gradient norm, speed and quick scores of runs as one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lamamba.options.base import verb
from lamamba.options.plot import PlotOptions
from lamamba.utils.files import check_target
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

    def __str__(self) -> str:
        return f"{self.path}: " + ", ".join(f"{run} to step {step}" for run, step in self.last_steps.items())

    def _repr_png_(self) -> bytes:
        return self.png


@verb
def plot(options: PlotOptions) -> PlotResult:
    """Draw loss, gradient norm, images per second and quick scores of runs over their optimizer steps.

    Raises:
        FileNotFoundError: when a run has no metrics.jsonl.
        ValueError: when it has no lines yet, or others than a run's.
    """
    check_target(options.out)
    metrics, scores = {}, {}
    for run in options.runs:
        path = run if run.suffix == ".jsonl" else run / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{run} has no metrics.jsonl; give the folder of a run that has begun")
        metrics[str(run)] = read_metrics(path)
        if (path.parent / "scores.jsonl").is_file():
            scores[str(run)] = read_metrics(path.parent / "scores.jsonl", SCORES)
    run_curves(metrics, options.out, options.smooth, scores)
    last_steps = {run: lines[-1]["step"] for run, lines in metrics.items()}
    return PlotResult(options.out, last_steps, options.out.read_bytes())
