"""lamamba.compress: half the layers, chosen by LAPTOP-Diff's criterion; and its steps one by one."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamamba.api.train import TrainResult, train
from lamamba.benchmarking.environment import device_name
from lamamba.compression import calibration as calibrations
from lamamba.compression.additivity import relative_distance, relative_loss
from lamamba.compression.calibration import Calibration
from lamamba.compression.folder import PLAN, write_pruned
from lamamba.compression.job import SCORES, find_scores, score_in_folder
from lamamba.compression.lamamba_units import LaMambaUnits
from lamamba.compression.pictures import draw_units
from lamamba.compression.plan import Plan, check_plan, check_scored, check_share, in_order, make_plan
from lamamba.compression.scores import RULES, Scores, by_rule
from lamamba.compression.timing import measure_pair, measure_times
from lamamba.models.unet import LaMambaUNet
from lamamba.options.base import from_dict, verb
from lamamba.options.compress import (
    BudgetOptions,
    CalibrationOptions,
    CompressOptions,
    PlanRemovalOptions,
    RemoveUnitsOptions,
    ScoreUnitsOptions,
)
from lamamba.options.training import (
    DataOptions,
    DistillOptions,
    ModelOptions,
    SampleGridOptions,
    StartOptions,
    TrainConfig,
    TrainOptions,
    load_recipe,
)
from lamamba.runs.folder import RunFolder
from lamamba.runs.metadata import ModelMetadata, check_same_data
from lamamba.runs.model import SHIPPED, fingerprint, model_folder, open_network
from lamamba.training.sources import open_data
from lamamba.utils.distributed import is_rank_zero, launched_group, launched_rank, local_device
from lamamba.utils.files import check_folder, check_target, read_json
from lamamba.utils.progress import ProgressOption, Report, reporting

logger = logging.getLogger("lamamba.api")

SHIPPED_RECIPE = "digits_small"
"""Of the model in the package."""


@dataclass(frozen=True)
class Teacher:
    """A network to compress, opened."""

    name: str
    network: LaMambaUNet = field(repr=False)
    metadata: ModelMetadata
    data: TrainConfig | None
    """Of its training, where that is known."""
    sha256: str

    @cached_property
    def units(self) -> LaMambaUnits:
        """The network as removable units."""
        return LaMambaUnits(self.network)

    def about(self) -> dict[str, str]:
        return {"teacher": self.name, "teacher_sha256": self.sha256}


def open_teacher(name: str, device: torch.device) -> Teacher:
    """The network of a run, a checkpoint, a saved model or "shipped", with what is known of its training.

    Raises:
        FileNotFoundError, ValueError: when there is none, it is damaged, or a flow map.
    """
    network, metadata = open_network(name)
    if network.architecture.objective == "flow-map":
        raise ValueError(f"{name} is a flow map: compress its flow model, and train a flow map of the result")
    data, folder = None, Path(name)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    if (config := RunFolder(folder).config).is_file() and "train" in (values := read_json(config)):
        data = TrainConfig.from_dict(values["train"], config)
    if name == SHIPPED:
        data = load_recipe(SHIPPED_RECIPE)
    return Teacher(name, network.to(device).eval(), metadata, data, fingerprint(network))


def data_options(teacher: Teacher, source: str | None) -> DataOptions:
    """How to read a source for a teacher: as it was trained.

    Raises:
        ValueError: when nothing says what it was trained on.
    """
    if source is None or (teacher.data is not None and source == teacher.data.data.source):
        if teacher.data is None:
            raise ValueError(
                f"{teacher.name} does not say what it was trained on: name it as data, or data=sampling for "
                "states of its own sampling"
            )
        return teacher.data.data
    metadata, config = teacher.metadata, teacher.network.architecture
    return DataOptions(
        source=source, image_size=metadata.image_size, use_labels=config.num_classes > 0,
        autoencoder=metadata.autoencoder if metadata.codec == "latents" else None,
        channels=3 if metadata.codec == "latents" or config.in_channels == 3 else 1,
    )


def calibrate(teacher: Teacher, options: CalibrationOptions, *, held_out: bool = False) -> Calibration:
    """The calibration set that the options describe; the samples after those where it is held out.

    Raises:
        FileNotFoundError, ValueError: when the data is missing, or not that of the teacher.
    """
    low, high = options.times
    after = held_out * options.samples
    if options.data == "sampling":
        return calibrations.from_sampling(
            teacher.network, samples=options.samples, seed=options.seed + after, times=(low, high),
            batch_size=options.batch_size,
        )
    chosen = data_options(teacher, options.data)
    data = open_data(TrainConfig(data=chosen, device=options.device))
    check_same_data(teacher.name, teacher.metadata, data.name, data.label_names, data.codec)
    if held_out and len(data) < 2 * options.samples:
        logger.warning(
            "%s has %s images: they repeat, with other noise, in %s samples to score on and as many to measure on",
            data.name, f"{len(data):,}", f"{options.samples:,}",
        )
    found = calibrations.from_data(
        teacher.network, data, samples=options.samples, first=after, seed=options.seed, times=(low, high),
        batch_size=options.batch_size,
    )
    return dataclasses.replace(found, about={**found.about, "source": chosen.source})


@dataclass(frozen=True)
class ScoreUnitsResult:
    """The score of every unit."""

    scores: Scores = field(repr=False)
    path: Path
    """scores.json."""
    picture: Path
    """The network as a table of scores."""

    def __str__(self) -> str:
        scores = self.scores
        order = sorted(range(len(scores.units)), key=lambda number: scores.values[number])
        rows = [
            f"  {scores.units[number].name:<28}{scores.values[number] / scores.energy:>11.3g}"
            f"{scores.errors[number] / scores.energy:>11.1g}{scores.units[number].parameters / scores.parameters:>9.2%}"
            for number in order
        ]
        if len(rows) > 24:
            rows = [*rows[:12], f"  ... {len(rows) - 24} more in {self.path}", *rows[-12:]]
        relative = {"output": ", relative to the output", "task": ", relative to the loss"}.get(scores.criterion, "")
        head = f"  {'unit':<28}{'score':>11}{'error':>11}{'size':>9}"
        return "\n".join([
            f"{len(scores.units)} units, criterion {scores.criterion}{relative}, lowest first",
            head, *rows, f"{self.path}, {self.picture}",
            f"plan with them: lamamba compress plan {self.path} --remove 0.5",
        ])

    def _repr_png_(self) -> bytes:
        return self.picture.read_bytes()


@verb
def score_units(options: ScoreUnitsOptions, *, progress: ProgressOption = "auto") -> ScoreUnitsResult:
    """Score every unit of a network: the change of the output without it, E ||f(x without u) - f(x)||^2.

    Resumable unit by unit; under a launcher, or started several times, processes share the units.

    Raises:
        FileNotFoundError: when there is no such model or data.
        ValueError: when data and model do not fit, or the folder holds scores made otherwise.
        FloatingPointError: when the network's output is not finite.
        OSError: when the disk is full; units that are done stay.
    """
    check_folder(options.out)
    teacher = open_teacher(options.model, local_device(options.device))
    with reporting(progress if is_rank_zero() else None) as report:
        scores = _scores(teacher, options, options.out, options.criterion, report)
    picture = options.out / "units.png"
    if is_rank_zero():
        draw_units(scores, picture)
    return ScoreUnitsResult(scores, options.out / SCORES, picture)


def _scores(teacher: Teacher, options: CalibrationOptions, folder: Path, criterion: str, report: Report) -> Scores:
    if criterion in RULES:
        about = {**teacher.about(), "criterion": criterion, "seed": options.seed}
        if (scores := find_scores(folder, about)) is None:
            scores = by_rule(teacher.units, criterion, options.seed, about)
            scores.save(folder / SCORES)
        return scores
    return score_in_folder(
        teacher.units, calibrate(teacher, options), folder, criterion=criterion, about=teacher.about(),
        rank=launched_rank(), report=report,
    )


@dataclass(frozen=True)
class PlanRemovalResult:
    """A plan, and where it is."""

    plan: Plan
    path: Path
    """plan.json."""
    picture: Path
    """The network with what goes."""

    def __str__(self) -> str:
        return f"{self.plan}\n{self.path}, {self.picture}\napply it: lamamba compress apply {self.path} --out pruned"

    def _repr_png_(self) -> bytes:
        return self.picture.read_bytes()


@verb
def plan_removal(options: PlanRemovalOptions, *, progress: ProgressOption = "auto") -> PlanRemovalResult:
    """The exact best set of units for a budget, with its predicted and its measured loss.

    Raises:
        FileNotFoundError: when there are no scores, or the scored network is gone.
        ValueError: when the budget cannot be met (with the most that can), a unit is unknown, or the network is
            another one than was scored.
    """
    path = options.scores / SCORES if options.scores.is_dir() else options.scores
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; lamamba compress score MODEL makes it")
    scores, out = Scores.load(path), options.out or path.parent / PLAN
    _check_budget(options)
    if out.suffix != ".json" or out.resolve() == path.resolve():
        raise ValueError(f"out={str(out)!r} must be a .json file of its own, as in plan.json; a picture goes beside it")
    check_target(out)
    needs_network = options.measure or options.by == "time"
    teacher = _open_scored(scores.about, local_device(options.device), options.model) if needs_network else None
    if teacher is not None:
        check_scored(scores, teacher.units)
    samples = _calibration_of(scores)
    if options.data is not None:
        samples = dataclasses.replace(samples, data=options.data)
    with reporting(progress) as report:
        plan = _plan(scores, options, teacher, samples if options.measure else None, report)
    plan.save(out)
    picture = out.with_suffix(".png")
    draw_units(scores, picture, plan.removed)
    return PlanRemovalResult(plan, out, picture)


def _open_scored(about: Mapping[str, Any], device: torch.device, name: str | None = None) -> Teacher:
    """The network that was scored: the same by its hash."""
    if name is None and "teacher" not in about:
        raise ValueError("the scores do not say which network they are of: name it as model")
    teacher, sha256 = open_teacher(name or str(about.get("teacher")), device), str(about.get("teacher_sha256"))
    if teacher.sha256 != sha256:
        raise ValueError(
            f"{teacher.name} is another network (SHA-256 {teacher.sha256[:12]}) than was scored ({sha256[:12]}); score "
            "it again"
        )
    return teacher


def _plan(
    scores: Scores, options: BudgetOptions, teacher: Teacher | None, samples: CalibrationOptions | None, report: Report
) -> Plan:
    """The plan of a budget, with what it measures on the samples held out of a calibration set; None: nothing."""
    times = None
    if options.by == "time" and teacher is not None:
        times = measure_times(teacher.units, _forward(teacher, teacher.network), report=report)
    if scores.criterion in ("hand", "random") and options.remove is not None:
        plan = in_order(scores, options.remove, options.by, options.keep, times)
    else:
        plan = make_plan(
            scores, remove=options.remove, max_loss=options.max_loss, by=options.by, keep=options.keep, times=times
        )
    plan = dataclasses.replace(plan, about={**plan.about, "budget": _budget(options)})
    if times is not None and teacher is not None:
        pruned = teacher.units.without(plan.removed)
        whole_seconds, seconds = measure_pair(
            _forward(teacher, teacher.network), _forward(teacher, pruned), teacher.network.device)
        found = {"device": device_name(str(teacher.network.device)), "images": 1, "seconds": times}
        plan = dataclasses.replace(plan, times=found, measured_time=1 - seconds / whole_seconds)
    if samples is None or teacher is None:
        return plan
    held_out = calibrate(teacher, samples, held_out=True)
    if held_out.about.get("fingerprint") != scores.about.get("fingerprint", held_out.about.get("fingerprint")):
        raise ValueError(
            f"{held_out.about['data']} is not what the units were scored on, or has changed since; score them again")
    return dataclasses.replace(plan, measured=relative_loss(teacher.units, plan.removed, held_out))


def _check_budget(options: BudgetOptions) -> None:
    if (options.remove is None) == (options.max_loss is None):
        raise ValueError("say how much to remove (remove=0.5) or how much loss to allow (max_loss=0.01): one of both")


def _budget(options: BudgetOptions) -> dict[str, Any]:
    """The budget of a plan, as it is saved with it."""
    return {"remove": options.remove, "max_loss": options.max_loss, "by": options.by, "keep": list(options.keep)}


def _calibration_of(scores: Scores) -> CalibrationOptions:
    """The options that the calibration set of scores was made by; the defaults where there was none."""
    about = scores.about
    if "samples" not in about:
        return CalibrationOptions()
    source = "sampling" if str(about.get("data")).startswith("states of") else about.get("source")
    found = {key: about[key] for key in ("samples", "seed", "times") if key in about}
    return from_dict(CalibrationOptions, {"data": source, **found}, "about of the scores")


def _forward(teacher: Teacher, network: nn.Module) -> Callable[[], object]:
    """A forward pass of one image."""
    config, device = teacher.network.architecture, teacher.network.device
    x = torch.randn(1, config.in_channels, *config.input_size, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device) if config.num_classes else None

    def forward() -> object:
        with torch.inference_mode():
            return network(x, 500.0, labels)

    return forward


@dataclass(frozen=True)
class RemoveUnitsResult:
    """A pruned network on disk."""

    path: Path
    network: LaMambaUNet = field(repr=False)
    parameters: int
    """Of the pruned network."""
    whole_parameters: int
    """Of the teacher."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.parameters / 1e6:.2f} M of {self.whole_parameters / 1e6:.2f} M parameters\n"
            f"sample it: lamamba sample {self.path} --out grid.png"
        )


@verb
def remove_units(options: RemoveUnitsOptions) -> RemoveUnitsResult:
    """Make the pruned network of a plan: a folder that sample, app, evaluate, train, export and open_model read.

    Raises:
        FileNotFoundError: when plan or model are missing.
        FileExistsError: when the target exists.
        ValueError: when the model is another one than was planned for.
    """
    path = options.plan / PLAN if options.plan.is_dir() else options.plan
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; lamamba compress plan SCORES makes it")
    check_folder(options.out, is_new=True)
    plan = Plan.load(path)
    teacher = _open_scored(plan.about, torch.device("cpu"), options.model)
    check_plan(plan, teacher.units, path)
    return _remove(teacher, plan, options.out)


def _remove(teacher: Teacher, plan: Plan, out: Path) -> RemoveUnitsResult:
    pruned = teacher.units.without(plan.removed)
    write_pruned(out, pruned, teacher.metadata, plan, model_folder(teacher.name))
    return RemoveUnitsResult(out, pruned, pruned.num_parameters(), teacher.units.parameters)


@dataclass(frozen=True)
class CompressResult:
    """A network without part of its layers, and healed where that was wanted."""

    plan: Plan
    pruned: RemoveUnitsResult
    healed: TrainResult | None
    healed_loss: float | None
    """Relative output loss of the healed network, on samples that no unit was scored on."""
    picture: Path
    """The network with what went."""

    @property
    def path(self) -> Path:
        """The network to use: the healed run, or the pruned network."""
        return self.healed.folder if self.healed else self.pruned.path

    def __str__(self) -> str:
        plan, pruned = self.plan, self.pruned
        losses = ("predicted", plan.predicted), ("measured", plan.measured), ("healed", self.healed_loss)
        lines = [
            f"{pruned.whole_parameters / 1e6:.2f} M -> {pruned.parameters / 1e6:.2f} M parameters "
            f"({plan.parameters:.1%} fewer, {plan.multiply_adds:.1%} fewer multiply-adds), "
            f"{len(plan.removed)} units removed: {self.picture}",
            "relative output loss: " + ", ".join(f"{name} {loss:.3g}" for name, loss in losses if loss is not None),
        ]
        return "\n".join([*lines, f"sample it: lamamba sample {self.path} --out grid.png"])

    def _repr_png_(self) -> bytes:
        return self.picture.read_bytes()


@verb
def compress(options: CompressOptions, *, progress: ProgressOption = "auto") -> CompressResult:
    """Score the units of a network, plan, remove and heal; the same call goes on where an earlier one was stopped.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError, OSError: as the steps do.
        Interrupted: when a signal stopped the healing, after a checkpoint.
    """
    out, device = options.out, local_device(options.device)
    check_folder(out)
    _check_budget(options)
    teacher = open_teacher(options.model, device)
    source = None if options.data == "sampling" else options.data
    if options.heal:
        data_options(teacher, source)                                           # or refuse now
    target, picture = out / "pruned", out / "units.png"
    check_share(teacher.units, options.remove or 0, options.by, options.keep)   # or refuse now

    def prune() -> None:
        if _holds(target, {**scores.about, "budget": _budget(options)}):
            return
        plan = _plan(scores, options, teacher, options, report)
        plan.save(out / PLAN)
        draw_units(scores, picture, plan.removed)
        _remove(teacher, plan, target)

    with launched_group() as group, reporting(progress if group.is_rank_zero else None) as report:
        scores = _scores(teacher, options, out, "output", report)
        group.on_rank_0(prune)
    plan, (pruned, _) = Plan.load(target / PLAN), open_network(target)
    check_plan(plan, teacher.units, target / PLAN)
    result = RemoveUnitsResult(target, pruned, pruned.num_parameters(), teacher.units.parameters)
    if not options.heal:
        return CompressResult(plan, result, None, None, picture)
    healed = train(_healing(options, teacher, result, source), progress=progress)
    held_out = calibrate(teacher, options, held_out=True)
    student = open_network(healed.folder)[0].to(device).eval()
    loss = relative_distance(held_out.predictions(student), held_out.predictions(teacher.network))
    return CompressResult(plan, result, healed, loss, picture)


def _holds(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether a pruned network is there, by the same scores and budget.

    Raises:
        FileExistsError: when another one is there.
    """
    if not folder.exists():
        return False
    found = Plan.load(folder / PLAN).about if (folder / PLAN).is_file() else {}
    if found != json.loads(json.dumps(about)):
        raise FileExistsError(f"{folder} holds another network; repeat the options to go on, or give another folder")
    return True


def _healing(options: CompressOptions, teacher: Teacher, pruned: RemoveUnitsResult, source: str | None) -> TrainOptions:
    """A training from the pruned network with the whole one as teacher; the rest is as the teacher was trained."""
    steps, base = options.heal, teacher.data or TrainConfig()
    optimizer = dataclasses.replace(
        base.optimizer, learning_rate=options.heal_learning_rate or base.optimizer.learning_rate,
        warmup_steps=min(50, steps // 10), schedule="constant", cooldown_share=0.3,
    )
    return TrainOptions(
        out=options.out / "healed", model=ModelOptions.of(pruned.network.architecture), loss=base.loss,
        precision=base.precision, processes=base.processes, label_dropout=base.label_dropout,
        data=data_options(teacher, source), start=StartOptions(source=str(pruned.path)),
        distill=DistillOptions(teacher=str(teacher.name)), optimizer=optimizer,
        sampling=SampleGridOptions(every=0, guidance=teacher.metadata.guidance), steps=steps,
        batch_size=options.heal_batch_size, ema_decays=(max(0.0, 1 - 6 / max(steps, 6)),),
        checkpoint_every=max(1, min(500, steps // 4)), seed=options.seed, device=options.device,
    )
