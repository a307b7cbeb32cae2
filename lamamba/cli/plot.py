"""lamamba plot: loss, gradient norm and speed of one or several runs in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamamba.cli.parse import parse

DESCRIPTION = """Draw loss, gradient norm and images per second of runs over their steps, into one PNG.

  lamamba plot runs/digits
  lamamba plot runs/a runs/b runs/c --out compared.png

Thin lines are what was logged, thick ones a running mean; dots are the loss on held-out images. Quick scores, where
there are any (--score.every of lamamba train), have a panel of their own."""


@dataclass(frozen=True, kw_only=True)
class PlotArguments:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders (or their metrics.jsonl)."""
    out: Path = Path("runs.png")
    """The picture."""
    smooth: float = 0.02
    """Share of a run that the running mean spans; 0: none."""


def main(arguments: list[str]) -> None:
    chosen = parse(PlotArguments, arguments, "plot", DESCRIPTION)
    if not chosen.runs:
        raise ValueError("name at least one run, as in lamamba plot runs/digits")
    if not 0 <= chosen.smooth <= 1:
        raise ValueError(f"--smooth {chosen.smooth} must lie in [0, 1]")

    from lamamba.viz.curves import read_metrics, run_curves

    metrics, scores = {}, {}
    for run in chosen.runs:
        path = run if run.suffix == ".jsonl" else run / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{run} has no metrics.jsonl; give the folder of a run that has begun")
        metrics[str(run)] = read_metrics(path)
        if (path.parent / "scores.jsonl").is_file():
            scores[str(run)] = read_metrics(path.parent / "scores.jsonl")
    run_curves(metrics, chosen.out, chosen.smooth, scores)
    told = (f"{name} to step {lines[-1]['step']}" for name, lines in metrics.items())
    print(f"{chosen.out}: {', '.join(told)}")
