"""lamamba.benchmark: LaMamba and DiT side by side on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamamba.benchmarking.environment import environment
from lamamba.benchmarking.peers.registry import find_peer
from lamamba.benchmarking.report import describe, table
from lamamba.benchmarking.throughput import Case, cost_of, measure, parse_model, ratios
from lamamba.options.base import verb
from lamamba.options.benchmark import BenchmarkOptions
from lamamba.utils.distributed import pick_device
from lamamba.utils.files import check_target, write_atomically
from lamamba.utils.progress import Progress, ProgressOption, reporting
from lamamba.viz.curves import cost_curves

PLOTTED_SIZES = (256, 512, 1024, 2048)
"""Image sizes whose multiply-adds are drawn, besides those that were timed."""
VERSION = 1


@dataclass(frozen=True)
class BenchmarkResult:
    """Times, memory and operations of networks, and the environment in which they were measured."""

    rows: list[dict[str, Any]]
    """One per network and image size: ms (median of a pass), ms_quartiles, images_per_second, peak_memory_bytes, ..."""
    ratios: list[dict[str, Any]]
    """Images per second of each model over those of each peer."""
    environment: dict[str, Any] = field(repr=False)
    """Device, versions, commit, date and settings."""
    paths: tuple[Path, ...] = ()
    """Files that were written."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"version": VERSION, "rows": self.rows, "ratios": self.ratios, "environment": self.environment}

    def to_markdown(self) -> str:
        """The environment and the table as a Markdown page."""
        lines = "\n".join(f"- {key}: {value}" for key, value in describe(self.environment))
        mode, dtype = self.rows[0]["mode"], self.rows[0]["dtype"]
        what = "training step" if mode == "train" else "forward pass"
        return f"# LaMamba beside DiT: {what}, {dtype}\n\n{lines}\n\n{table(self.rows, self.ratios)}\n"

    def __str__(self) -> str:
        lines = [f"{key:<12}{value}" for key, value in describe(self.environment)]
        return "\n".join([*lines, "", table(self.rows, self.ratios), *(f"wrote {path}" for path in self.paths)])


@verb
def benchmark(options: BenchmarkOptions, *, progress: ProgressOption = "auto") -> BenchmarkResult:
    """Time LaMamba presets beside DiT: same batch, precision and settings, in turns, each network in its own process.

    Args:
        options: networks, sizes and settings; files to write.
        progress: "auto", a function of Progress values, or None.

    Raises:
        ValueError: for unknown networks or sizes that do not fit, before anything is built.
        RuntimeError: when a network cannot be built or run, with the reason.
    """
    paths = tuple(path for path in (options.json, options.markdown, options.plot) if path)
    for path in paths:
        if not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: the folder {path.resolve().parent} does not exist; make it first")
        check_target(path)
    groups = plan(options)
    where = environment(groups[0][0], seconds=options.seconds, processes=options.processes)
    rows: list[dict[str, Any]] = []
    with reporting(progress) as report:
        for number, cases in enumerate(groups):
            def note(text: str, number: int = number) -> None:
                report(Progress("timing", number, len(groups), unit="image sizes", note=text))

            rows += measure(cases, seconds=options.seconds, processes=options.processes, on_progress=note)
            result = BenchmarkResult(rows, ratios(rows), where, paths)
            if options.json:
                write_atomically(options.json, json.dumps(result.to_dict(), indent=2) + "\n")
    if options.markdown:
        write_atomically(options.markdown, result.to_markdown())
    if options.plot:
        cost_curves(rows, _curves(groups), options.plot)
    return result


@verb
def plan(options: BenchmarkOptions) -> list[list[Case]]:
    """The networks to time in turns, for each image size.

    Raises:
        ValueError: for an unknown network, or a size that does not fit.
    """
    peers = () if options.peers == ("none",) else options.peers
    for name in peers:
        find_peer(name)
    for name in options.models:
        for size in options.image_sizes:
            parse_model(name, size, options.state_size)
    models = options.models
    if options.state_size > 1:
        models = tuple(name if "-n" in name else f"{name}-n{options.state_size}" for name in models)
    picked = pick_device(options.device)
    device = "cpu" if picked.type == "cpu" else str(picked)
    batches = options.batch * len(options.image_sizes) if len(options.batch) == 1 else options.batch
    return [
        [
            Case(
                name, size, batch, options.dtype, device, options.mode, options.compile, options.threads, options.pack
            )
            for name in (*models, *peers)
        ]
        for size, batch in zip(options.image_sizes, batches, strict=True)
    ]


def _curves(groups: list[list[Case]]) -> dict[str, list[tuple[int, int]]]:
    """(image size, multiply-adds) of each network that was timed, at its sizes and at some more."""
    sizes = sorted({*PLOTTED_SIZES, *(cases[0].image_size for cases in groups)})
    return {case.model: [(size, cost_of(case.model, size).matrix) for size in sizes] for case in groups[0]}
