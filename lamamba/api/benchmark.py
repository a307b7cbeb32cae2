"""lamamba.benchmark: LaMamba and the systems of the paper's tables side by side on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lamamba.benchmarking.environment import environment
from lamamba.benchmarking.interrupted import interrupted_sets, written_alone
from lamamba.benchmarking.peers.registry import find_peer, peers_for
from lamamba.benchmarking.report import describe, explain, table
from lamamba.benchmarking.throughput import Case, OutOfMemory, cost_of, measure, parse_model, ratios
from lamamba.benchmarking.turns import leave_out, left_out, merge, sets_in_turns
from lamamba.config import UNetConfig
from lamamba.options.base import verb
from lamamba.options.benchmark import BenchmarkOptions
from lamamba.utils.distributed import pick_device
from lamamba.utils.files import check_target, write_atomically, write_json
from lamamba.utils.progress import Progress, ProgressOption, reporting
from lamamba.viz.curves import cost_curves, efficiency_points

PLOTTED_SIZES = (256, 512, 1024, 2048)
"""Image sizes whose multiply-adds are drawn, besides those that were timed."""
VERSION = 2
"""2: sets of networks that took turns, large products, networks that were left out."""
logger = logging.getLogger("lamamba.api")


@dataclass(frozen=True)
class BenchmarkResult:
    """Times, memory and operations of networks, and the environment in which they were measured."""

    sets: list[dict[str, Any]] = field(repr=False)
    """A row for each time that a network was timed; rows with the same "set" took turns."""
    environment: dict[str, Any] = field(repr=False)
    """Device, versions, commit, date and settings."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Networks that do not fit into memory, each with its reason."""
    paths: tuple[Path, ...] = ()
    """Files that were written."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per network and image size: ms (median of a pass), images_per_second, share_of_product, ..."""
        return merge(self.sets)

    @property
    def ratios(self) -> list[dict[str, Any]]:
        """Images per second of each model over those of each peer, as they took turns."""
        return ratios(self.sets)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "version": VERSION, "rows": self.rows, "ratios": self.ratios, "sets": self.sets, "left_out": self.left_out,
            "environment": self.environment,
        }

    def to_markdown(self) -> str:
        """The environment and the table as a Markdown page."""
        lines = "\n".join(f"- {key}: {value}" for key, value in describe(self.environment))
        mode, dtype = self.sets[0]["mode"], self.sets[0]["dtype"]
        what = "training step" if mode == "train" else "forward pass"
        notes = "".join(f"- {line}\n" for line in explain(self.rows, self.left_out))
        return f"# LaMamba beside its peers: {what}, {dtype}\n\n{lines}\n\n{table(self.rows, self.ratios)}\n\n{notes}"

    def __str__(self) -> str:
        lines = [f"{key:<12}{value}" for key, value in describe(self.environment)]
        notes = explain(self.rows, self.left_out)
        written = [f"wrote {path}" for path in self.paths]
        return "\n".join([*lines, "", table(self.rows, self.ratios), "", *notes, *written])


@verb
def benchmark(options: BenchmarkOptions, *, progress: ProgressOption = "auto") -> BenchmarkResult:
    """Time LaMamba presets beside peers: same batch, precision and settings, in turns, each network in its own process.

    Where not all networks fit into memory together, LaMamba takes turns with one peer after the other; what does not
    fit alone is left out. With a JSON file, the same call goes on where it was interrupted.

    Args:
        options: networks, sizes and settings; files to write.
        progress: "auto", a function of Progress values, or None.

    Raises:
        BlockingIOError: when another call writes the JSON file.
        ValueError: for unknown networks or sizes that do not fit, or a JSON file of something else, before anything is
            built.
        RuntimeError: when a network cannot be built or run, with the reason.
    """
    for path in options.paths:
        check_target(path)
    groups = plan(options)
    where = environment(groups[0][0], seconds=options.seconds, processes=options.processes)
    every = [case for cases in groups for case in cases]
    with written_alone(options.json), reporting(progress) as report:
        result = BenchmarkResult(interrupted_sets(options.json, where, every), where, paths=options.paths)
        if result.sets:
            logger.info("going on: %d networks were timed before", len(result.rows))

        def note(text: str) -> None:
            done = len({(row["image_size"], row["model"]) for row in result.sets}) + len(result.left_out)
            report(Progress("timing", done, len(every), unit="networks", note=text))

        for cases in groups:
            for _ in _measure_size(cases, options, result, note):
                if options.json:
                    write_json(options.json, {**result.to_dict(), "plan": [asdict(case) for case in every]})
        if options.json:
            write_json(options.json, result.to_dict())
    if options.markdown:
        write_atomically(options.markdown, result.to_markdown())
    if options.plot:
        cost_curves(result.rows, _curves(groups), options.plot)
    if options.plot_efficiency:
        efficiency_points(result.rows, options.plot_efficiency)
    return result


def _measure_size(
    cases: list[Case], options: BenchmarkOptions, result: BenchmarkResult, note: Callable[[str], None],
) -> Iterator[None]:
    """Time the networks of an image size that the result lacks, and add them set by set."""
    done = {row["model"] for row in result.sets if row["image_size"] == cases[0].image_size}
    missing = [case for case in cases if case.model not in done]
    if not missing:
        return
    ours = [case for case in cases if not case.is_peer]
    note(f"{cases[0].image_size} px: estimating memory")
    fitting, others = leave_out([*ours, *(case for case in missing if case.is_peer)])
    result.left_out.extend(others)
    for present in sets_in_turns(fitting, options.processes):
        processes = options.processes
        while any(case.model not in done for case in present):
            try:
                rows = measure(present, seconds=options.seconds, processes=processes, on_progress=note)
            except OutOfMemory as error:
                if processes == "auto":                                         # which of them is too large, if any?
                    processes = "apart"
                    continue
                if not error.case.is_peer:
                    raise
                result.left_out.append(left_out(error.case, str(error)))
                present = [case for case in present if case != error.case]
                continue
            number = 1 + max((row["set"] for row in result.sets), default=0)
            result.sets.extend({**row, "set": number} for row in rows)
            done |= {case.model for case in present}
            yield


@verb
def plan(options: BenchmarkOptions) -> list[list[Case]]:
    """The networks to time in turns, for each image size.

    Raises:
        ValueError: for an unknown network, or a size that does not fit.
    """
    for size in options.image_sizes:
        networks: dict[UNetConfig, str] = {}
        for name in options.models:
            if (other := networks.setdefault(parse_model(name, size, options.state_size), name)) != name:
                raise ValueError(f"models {other} and {name} are one network; name it once")
        for name in _peers(options.peers, size):
            find_peer(name).side(size)
    models = options.models
    if options.state_size > 1:
        models = tuple(name if "-n" in name else f"{name}-n{options.state_size}" for name in models)
    picked = pick_device(options.device)
    device = "cpu" if picked.type == "cpu" else str(picked)
    batches = options.batch * len(options.image_sizes) if len(options.batch) == 1 else options.batch
    return [
        [
            Case(name, size, batch, options.dtype, device, options.mode, options.compile, options.threads, options.pack)
            for name in (*models, *_peers(options.peers, size))
        ]
        for size, batch in zip(options.image_sizes, batches, strict=True)
    ]


def _peers(names: tuple[str, ...], image_size: int) -> tuple[str, ...]:
    """Names of peers, where "all" means those for this image size."""
    if names == ("all",):
        return peers_for(image_size)
    return () if names == ("none",) else names


def _curves(groups: list[list[Case]]) -> dict[str, list[tuple[int, int]]]:
    """(image size, multiply-adds) of each network that was timed, at its sizes and at some more."""
    sizes = sorted({*PLOTTED_SIZES, *(cases[0].image_size for cases in groups)})
    return {case.model: [(size, cost_of(case.model, size).matrix) for size in sizes] for case in groups[0]}
