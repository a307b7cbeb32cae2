"""lamamba.benchmark: LaMamba and DiT side by side on this machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch

from lamamba._version import __version__
from lamamba.benchmarking.environment import commit, device_name, version_of
from lamamba.benchmarking.peers import find_peer
from lamamba.benchmarking.report import described, table
from lamamba.benchmarking.throughput import MALLOC, Case, measure, multiply_adds, parse_model, ratios
from lamamba.ops.selective_scan import OP
from lamamba.options.benchmark import BenchmarkOptions
from lamamba.utils.distributed import pick_device
from lamamba.utils.files import write_atomically
from lamamba.utils.progress import Progress, ProgressOption, reporting
from lamamba.viz.curves import cost_curves

PLOTTED_SIZES = (256, 512, 1024, 2048)
"""Image sizes whose multiply-adds are drawn, besides those that were timed."""
VERSION = 1


@dataclass(frozen=True)
class BenchmarkResult:
    """Rows (one per network and size), ratios of speeds, and where they were measured."""

    rows: list[dict[str, Any]]
    ratios: list[dict[str, Any]]
    environment: dict[str, Any]
    paths: tuple[Path, ...] = ()
    """Files that were written."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"version": VERSION, "rows": self.rows, "ratios": self.ratios, "environment": self.environment}

    def to_markdown(self) -> str:
        """A page with environment and table."""
        lines = "\n".join(f"- {key}: {value}" for key, value in described(self.environment))
        mode, dtype = self.rows[0]["mode"], self.rows[0]["dtype"]
        what = "training step" if mode == "train" else "forward pass"
        return f"# LaMamba beside DiT: {what}, {dtype}\n\n{lines}\n\n{table(self.rows, self.ratios)}\n"

    def __str__(self) -> str:
        lines = [f"{key:<12}{value}" for key, value in described(self.environment)]
        return "\n".join([*lines, "", table(self.rows, self.ratios), *(f"wrote {path}" for path in self.paths)])


def benchmark(options: BenchmarkOptions, *, progress: ProgressOption = "auto") -> BenchmarkResult:
    """Time LaMamba presets beside DiT: same batch, precision and settings, in turns, each network in its own process.

    Raises:
        ValueError: for unknown networks or sizes that do not fit, before anything is built.
        RuntimeError: when a network cannot be built or run, with its reason.
    """
    paths = tuple(path for path in (options.json, options.markdown, options.plot) if path)
    for path in paths:
        if not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: the folder {path.resolve().parent} does not exist; make it first")
    groups = plan(options)
    facts = environment(groups[0][0], options)
    rows: list[dict[str, Any]] = []
    with reporting(progress) as report:
        for number, cases in enumerate(groups):
            def tell(text: str, number: int = number) -> None:
                report(Progress("timing", number, len(groups), unit="image sizes", note=text))

            rows += measure(cases, seconds=options.seconds, processes=options.processes, on_progress=tell)
            result = BenchmarkResult(rows, ratios(rows), facts, paths)
            if options.json:
                write_atomically(options.json, json.dumps(result.to_dict(), indent=2) + "\n")
    if options.markdown:
        write_atomically(options.markdown, result.to_markdown())
    if options.plot:
        cost_curves(rows, _curves(groups), options.plot)
    return result


def plan(options: BenchmarkOptions) -> list[list[Case]]:
    """For each image size, the networks that are timed in turns; all names and sizes are checked.

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


def environment(case: Case, options: BenchmarkOptions) -> dict[str, Any]:
    """Where and how the numbers were made."""
    device, is_cpu = torch.device(case.device), case.device == "cpu"
    x = torch.empty(0, device=device, dtype=getattr(torch, case.dtype))
    states = parse_model(options.models[0], case.image_size, options.state_size).state_size
    return {
        "device": device_name(case.device),
        "versions": {
            "lamamba": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "diffusers": diffusers.__version__, "triton": version_of("triton"), "cuda": torch.version.cuda,
            "system": platform.platform(),
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "backend": OP.choose(x, states), "threads": options.threads or torch.get_num_threads(),
            "compile": options.compile, "seconds": options.seconds, "processes": options.processes,
            "packed_weights": case.packs_weights, "attention": "scaled_dot_product_attention",
            "malloc": MALLOC if is_cpu and sys.platform == "linux" else None,
            "tf32": None if is_cpu else torch.backends.cuda.matmul.allow_tf32,
            "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("LAMAMBA_")},
        },
    }


def _curves(groups: list[list[Case]]) -> dict[str, list[tuple[int, int]]]:
    """(image size, multiply-adds) of each network that was timed, at its sizes and at some more."""
    sizes = sorted({*PLOTTED_SIZES, *(cases[0].image_size for cases in groups)})
    return {case.model: [(size, multiply_adds(case.model, size)) for size in sizes] for case in groups[0]}
