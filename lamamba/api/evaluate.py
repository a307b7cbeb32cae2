"""lamamba.evaluate: FID and other figures of samples against a reference."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from lamamba.evaluation.candidates import find_sample_sets
from lamamba.evaluation.evaluator import Evaluator
from lamamba.evaluation.protocol import make_protocol
from lamamba.evaluation.reference import Reference
from lamamba.evaluation.results import Entry, table, write_result
from lamamba.metrics.networks import open_network
from lamamba.options.base import verb
from lamamba.options.evaluation import EvaluateOptions
from lamamba.utils.distributed import launched_group, local_device
from lamamba.utils.files import check_target
from lamamba.utils.progress import Progress, ProgressOption, Report, reporting
from lamamba.utils.text import counted
from lamamba.viz.curves import evaluation_curves

logger = logging.getLogger("lamamba.api")


@dataclass(frozen=True)
class EvaluateResult:
    """Figures with their protocol, as in the result file."""

    entries: tuple[Entry, ...]
    """One for each set of weights and guidance scale."""
    path: Path
    """The result file."""
    reference: str
    curve: Path | None = None
    """A picture over training or guidance, where there are several entries."""

    @property
    def best(self) -> Entry:
        """The entry with the lowest Fréchet distance."""
        return min(self.entries, key=lambda entry: entry.figures["frechet"])

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the best entry by name: "frechet", "precision", "recall", ..."""
        return self.best.figures

    def _repr_png_(self) -> bytes | None:
        return self.curve.read_bytes() if self.curve else None

    def __str__(self) -> str:
        images = counted(self.entries[0].protocol["images"], "image")
        lines = [table(self.entries), f"{images} against {self.reference}; figures and protocol: {self.path}"]
        if all(e.guidance == 1 and e.protocol["samples"]["labels"] != "none" for e in self.entries):
            lines.append("sampled at guidance 1, the protocol of published figures; guidance takes other scales")
        return "\n".join([*lines, f"curve: {self.curve}"] if self.curve else lines)


class _StepReport:
    """Passes reports on, and repeats the last one with the sampling step of the current batch."""

    def __init__(self, report: Report):
        self._report, self._last = report, Progress("", 0, 0)

    def __call__(self, progress: Progress) -> None:
        self._last = progress
        self._report(progress)

    def on_step(self, step: int, steps: int) -> None:
        self._report(dataclasses.replace(self._last, note=f"step {step}/{steps}"))


@verb
def evaluate(options: EvaluateOptions, *, progress: ProgressOption = "auto") -> EvaluateResult:
    """Compute FID, sFID, Inception Score, precision, recall, density, coverage and KID, where features allow them.

    A model samples while it is evaluated: images are never kept. Under a launcher all processes work together, and each
    returns the result. Where an earlier call was stopped, the same call goes on.

    Raises:
        BlockingIOError: when another job evaluates into the same file.
        FileNotFoundError: when samples or reference are missing.
        ValueError: when samples, reference, feature network and options do not fit each other, or a file is damaged.
        RuntimeError: when a package that the feature network needs is missing.
        OSError: when weights cannot be downloaded, or the disk is full or broken; finished shards stay.
    """
    check_target(options.out)
    device = local_device(options.device)
    entries: list[Entry] = []
    reference: Reference | None = None
    with launched_group() as group, reporting(progress if group.is_rank_zero else None) as report:
        step_report = _StepReport(report)
        sample_sets = find_sample_sets(options, device, step_report.on_step)
        network = open_network(options.features, options.weights, device)
        evaluator = Evaluator(network, options, group, step_report)
        with evaluator.locked():
            for open_sample_set in sample_sets:
                sample_set = open_sample_set()
                image_shape = evaluator.fit(sample_set.runs[0]).shape           # refused before any work
                if reference is None:
                    reference = evaluator.open_reference(
                        options.reference, sample_set.runs[0], options.metrics.reference_rows
                    )
                reference.check(network.info, image_shape)
                protocol = make_protocol(sample_set, network, reference, options, device)
                entries.append(evaluator.evaluate(
                    sample_set, reference, options.metrics, protocol, keep_features=options.keep_features
                ))
                if group.is_rank_zero:
                    write_result(options.out, entries)
                    if len(sample_sets) > 1:
                        name, distance = entries[-1].name, entries[-1].figures["frechet"]
                        logger.info("%s: %s %.4f", name, network.distance_name, distance)
            assert reference is not None
            curve = options.out.with_suffix(".png") if len(entries) > 1 else None
            result = EvaluateResult(tuple(entries), options.out, reference.name, curve)
            if group.is_rank_zero:
                _finish(result, evaluator, options)
        group.wait()
    return result


def _finish(result: EvaluateResult, evaluator: Evaluator, options: EvaluateOptions) -> None:
    """Draw the curve, and remove what was kept for another call."""
    if result.curve is not None:
        entries = [dataclasses.asdict(entry) for entry in result.entries]
        evaluation_curves(entries, evaluator.network.distance_name, result.curve)
    elif options.every_checkpoint:
        logger.info("no curve of one checkpoint: training keeps more with keep_checkpoints or keep_every")
    if not options.keep_features:
        evaluator.clear()
