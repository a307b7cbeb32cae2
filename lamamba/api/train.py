"""lamamba.train: a training run, from its options; `plan`: what a run would be."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lamamba.benchmarking.flops import Cost, count
from lamamba.benchmarking.memory import TrainingMemory, training_memory
from lamamba.benchmarking.throughput import free_memory, training_rate
from lamamba.config import UNetConfig
from lamamba.data.codec import to_uint8
from lamamba.data.images import ImageSet, read_bad_files
from lamamba.data.sets import TrainingSet
from lamamba.evaluation.callbacks import MAX_GRID_CLASSES, QuickScore, SampleGrid, check_sampler, open_decoder
from lamamba.models.adapters import count_parameters
from lamamba.options.base import verb
from lamamba.options.training import TrainConfig, TrainOptions
from lamamba.runs.folder import RunFolder
from lamamba.runs.metadata import ModelMetadata
from lamamba.training import loop
from lamamba.training.checkpoint import TrainState
from lamamba.training.data import as_training_set
from lamamba.training.distributed import check_processes, shard_size
from lamamba.training.draws import split_held_out
from lamamba.training.loop import Callback, StepState, describe
from lamamba.training.sources import PlannedData, open_data, plan_data
from lamamba.training.start import check_start, lora_layers, open_base, with_network_of_source
from lamamba.utils.cores import waiting_threads
from lamamba.utils.distributed import is_rank_zero, launched_processes, local_device
from lamamba.utils.progress import Progress, ProgressOption, Report, duration, is_watched, reporting
from lamamba.utils.repeatable import computing_threads
from lamamba.utils.text import counted, shown
from lamamba.viz.curves import read_metrics
from lamamba.viz.grids import check_grid

logger = logging.getLogger("lamamba.api")

LOG_LINES = 20
"""Log lines of a run without a terminal or notebook, where its steps are fast."""
FIRST_LINE_SECONDS, LINE_SECONDS = 10.0, 55.0
"""Until the first of these lines, and between them, at most."""
SMALL_NETWORK, PARAMETERS_PER_IMAGE = 4_000_000, 20_000
"""Networks with more parameters than both learn their images by heart (our digits have 2,200 for each image)."""
MOST_EPOCHS = 500
"""That a warning of those recommends."""


@dataclass(frozen=True)
class TrainResult:
    """A run, trained to its last step."""

    folder: Path
    step: int
    """Optimizer steps done."""
    checkpoint: Path
    """The newest one."""
    metrics: dict[str, float]
    """The last line of metrics.jsonl: loss, grad_norm, learning_rate, images_per_second, ..."""
    bad_images: int
    """Files that could not be read, and were replaced by their neighbours."""
    state: TrainState = field(repr=False)
    """Network, averages and optimizer; the averaged network is `state.ema`."""

    @property
    def metrics_file(self) -> Path:
        """A line for every logged step."""
        return RunFolder(self.folder).metrics

    @property
    def sample_grid(self) -> Path | None:
        """The newest one, where there are any."""
        return max(RunFolder(self.folder).samples.glob("step_*.png"), default=None)

    def __str__(self) -> str:
        bad, files = RunFolder(self.folder).bad_images, counted(self.bad_images, "file")
        note = f"{files} could not be read, replaced by others: {bad}\n" if self.bad_images else ""
        lora = "" if self.state.base is None else "--lora "
        return f"{note}done: {self.folder}\nsample it: lamamba sample {lora}{self.folder} --out grid.png"

    def _repr_png_(self) -> bytes | None:
        return self.sample_grid.read_bytes() if self.sample_grid else None


@verb
def train(
    options: TrainOptions, *, data: ImageSet | TrainingSet | None = None, callbacks: Sequence[Callback] = (),
    progress: ProgressOption = "auto",
) -> TrainResult:
    """Train a network, with sample grids and quick scores as the options say.

    A run that was stopped (Ctrl-C, SIGTERM, an interrupted notebook cell) resumes when the same call is made again:
    after the first signal it finishes its step and writes a checkpoint, a second Ctrl-C stops at once.

    Args:
        options: of the run, and its folder.
        data: to train on; by default what options.data names.
        callbacks: called with a `StepState` after every optimizer step, on every rank.
        progress: see lamamba.utils.progress.

    Raises:
        OSError, ValueError: when data, configuration and folder do not fit together, or the disk is full.
        BlockingIOError: when another job trains in the folder, or another thread of this process.
        FloatingPointError: when a loss or gradient is not finite, and the options say to stop.
        Interrupted: when a signal stopped the run, after a checkpoint.
        RankZeroError: on the other ranks, when rank 0 raises.
        TypeError: for data or callbacks of another kind.
    """
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks={shown(callbacks)} must be a list of functions of a StepState")
    options = with_network_of_source(options)
    config, run = options.config, RunFolder(options.out)
    data = as_training_set(open_data(config, run.path) if data is None else data, config)
    architecture, metadata = describe(config, data)
    watcher = progress if is_rank_zero() else None
    is_logged = watcher == "auto" and not is_watched()                          # a line for a step now and then
    with reporting(watcher if is_logged else None) as report, reporting(None if is_logged else watcher) as report_step:
        pictures = _pictures(config, architecture, metadata, run, report)
        resumed = max(run.steps(), default=0)
        if is_rank_zero():
            _announce(config, data, architecture, run, resumed)
        show = _LogLines(resumed) if is_logged else _ProgressReport(report_step, resumed)
        state = loop.train(config, data, run.path, [show, *pictures, *callbacks], [
            functools.partial(picture, if_missing=True) for picture in pictures
        ])
    lines = read_metrics(run.metrics, may_be_empty=True) if run.metrics.is_file() else []
    return TrainResult(
        run.path, state.step, run.checkpoint(state.step), lines[-1] if lines else {},
        len(read_bad_files(run.bad_images)), state,
    )


def _pictures(
    config: TrainConfig, architecture: UNetConfig, metadata: ModelMetadata, run: RunFolder, report: Report
) -> list[SampleGrid | QuickScore]:
    """Callbacks for sample grids and quick scores; rank 0 samples, the others help to gather a sharded network.

    Raises:
        OSError, ValueError: for what they could not do later: a sampler for other models, a reference that is missing.
    """
    sampling, score, device = config.sampling, config.score, local_device(config.device)
    check_sampler(sampling, metadata)
    if sampling.every:
        count = len(metadata.label_names[:MAX_GRID_CLASSES] or ("",)) * sampling.per_class
        check_grid(count, metadata.image_size, metadata.image_size, " (sampling.per_class is of a class): take fewer")
    decoder = open_decoder(metadata, device) if is_rank_zero() and (sampling.every or score.every) else None
    decode = decoder.decode if decoder else to_uint8
    pictures: list[SampleGrid | QuickScore] = [SampleGrid(sampling, run.samples, metadata.label_names, decode, report)]
    if score.every:
        channels = decoder.autoencoder.out_channels if decoder else architecture.in_channels
        shape = (metadata.image_size, metadata.image_size, channels)
        pictures.append(
            QuickScore(score, sampling, run.scores, shape, decode, device, is_rank_zero=is_rank_zero(), report=report)
        )
    return pictures


def _announce(config: TrainConfig, data: TrainingSet, architecture: UNetConfig, run: RunFolder, resumed: int) -> None:
    parameters = count(architecture).parameters
    logger.info(
        f"{run.path}: {counted(len(data), 'image')} of {data.name}, {counted(architecture.num_classes, 'class')}, "
        f"{parameters / 1e6:.2f} M parameters; {counted(config.steps, 'step')} of {config.batch_size}, "
        f"{config.steps * config.batch_size / len(data):,.1f} epochs"
    )
    if resumed:
        logger.info(f"resuming at step {resumed}")
    for warning in _warnings(config, data, architecture, parameters, resumed):
        logger.warning(warning)


def _warnings(
    config: TrainConfig, data: TrainingSet, architecture: UNetConfig, parameters: int, resumed: int
) -> list[str]:
    """What is allowed but probably not meant, with what would fit."""
    found = config.warnings()
    if resumed > config.steps:
        found.append(
            f"the run is at step {resumed} already and steps={config.steps} counts from its beginning: nothing is "
            f"trained; more than {resumed} goes on"
        )
    if local_device(config.device).type == "cpu" and (
        hint := waiting_threads(config.processes.threads or torch.get_num_threads())
    ):
        found.append(hint)
    most = max(SMALL_NETWORK, PARAMETERS_PER_IMAGE * len(data))
    if parameters > most and config.start.source is None:
        multiple = math.lcm(4, architecture.num_heads)
        width = max(1, int(architecture.width * math.sqrt(most / parameters)) // multiple) * multiple
        smaller = architecture.replace(width=width)
        epochs = config.steps * config.batch_size / len(data)
        steps = math.ceil(MOST_EPOCHS * len(data) / config.batch_size)
        shorter = f"; steps={steps} sees each {MOST_EPOCHS} times" if steps < config.steps else ""
        found.append(
            f"{parameters / 1e6:.1f} M parameters for {counted(len(data), 'image')}, seen {epochs:,.0f} times each: "
            f"they will be learnt by heart. model.width={width} ({count(smaller).parameters / 1e6:.1f} M) fits so "
            f"few and is faster{shorter}"
        )
    return found


class _ProgressReport:
    """Reports every step, with loss (a running mean), gradient norm, speed and memory."""

    def __init__(self, report: Report, resumed: int):
        self._report, self._resumed = report, resumed
        self._smooth: float | None = None

    def __call__(self, state: StepState) -> None:
        self._report(Progress(
            "training", state.step, state.steps, unit="steps", resumed=self._resumed, note=self._note(state, "grad")
        ))

    def _note(self, state: StepState, norm: str) -> str:
        self._smooth = state.loss if self._smooth is None else 0.95 * self._smooth + 0.05 * state.loss
        return (
            f"loss {self._smooth:.4f}  {norm} {state.grad_norm:.3g}  {state.images_per_second:.0f} images/s  "
            f"{state.peak_memory / 2**30:.1f} GiB"
        )


class _LogLines(_ProgressReport):
    """Logs about twenty lines over the whole run, the first within seconds, and at least one in a minute."""

    def __init__(self, resumed: int):
        super().__init__(lambda progress: None, resumed)
        self._next = FIRST_LINE_SECONDS

    def __call__(self, state: StepState) -> None:
        note = self._note(state, "gradient norm")
        is_due = state.step % max(1, state.steps // LOG_LINES) == 0 or state.seconds >= self._next
        if not is_due and state.step != state.steps:
            return
        self._next = state.seconds + LINE_SECONDS
        left = state.seconds / max(1, state.step - self._resumed) * (state.steps - state.step)
        logger.info(f"step {state.step}/{state.steps}  {note}  {duration(state.seconds)}, {duration(left)} left")


@dataclass(frozen=True)
class TrainPlan:
    """What a run would be: network, cost, memory, time, epochs and learning rate."""

    options: TrainOptions
    architecture: UNetConfig
    metadata: ModelMetadata
    data: str
    """Name of the data."""
    images: int
    """Number of its images."""
    cost: Cost
    lora_parameters: int | None
    """Of a LoRA, which alone are trained."""
    memory: TrainingMemory
    """On each device."""
    images_per_second: float | None
    """Of all processes, measured here without reading data; None where data or memory are missing."""
    processes: int
    micro_batch: int
    """Images of a process at a time."""
    device: str
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Of the whole run, without sample grids and the like."""
        config = self.options.config
        return config.steps * config.batch_size / self.images_per_second if self.images_per_second else None

    def __str__(self) -> str:
        config, architecture, cost, memory = self.options.config, self.architecture, self.cost, self.memory
        per_epoch = self.images / config.batch_size
        group = counted(self.processes, "process")
        size, accumulated = config.data.image_size, config.processes.accumulation_steps
        steps, latents, time = counted(config.steps, "step"), "", "unknown: it is measured where the data is"
        lora = f", and {self.lora_parameters / 1e6:.2f} M of a LoRA to train" if self.lora_parameters else ""
        if self.metadata.codec == "latents":
            shape = " x ".join(map(str, (architecture.in_channels, *architecture.input_size)))
            latents = f", as latents ({shape}) of {self.metadata.autoencoder or 'an autoencoder'}"
        if self.seconds is not None:
            besides = "reading data and sampling" + (", and the teacher" if config.distill.teacher else "")
            time = (
                f"about {duration(self.seconds)} on this machine, {self.images_per_second:,.3g} images/s measured now, "
                f"without {besides}"
            )
        plan = f"""\
run folder        {self.options.out}
data              {self.data}: {counted(self.images, 'image')}, {size} x {size}{latents}
device            {self.device}, {group}
parameters        {cost.parameters / 1e6:.2f} M{lora}
multiply-adds     {cost.matrix / 1e9:.3f} G per image and forward pass, and {cost.scan / 1e9:.3f} G of the scan
memory            about {memory.peak / 2**30:.2f} GiB on each device: {memory.state / 2**30:.2f} weights, averages and \
optimizer, {memory.step / 2**30:.2f} for a step of {counted(self.micro_batch, 'image')} at a time
step              {counted(config.batch_size, 'image')} = {group} x {accumulated} x {self.micro_batch}
run               {steps}, {per_epoch:,.1f} steps per epoch: {config.steps / per_epoch:,.1f} epochs
time              {time}
learning rate     {config.schedule_in_words()}

{_configuration(config, architecture)}"""
        return "\n".join([plan, *(f"warning: {warning}" for warning in self.warnings)])


def _configuration(config: TrainConfig, architecture: UNetConfig) -> str:
    """All values that are given, a line for each section."""
    values = {**config.to_dict(), "network": architecture.to_dict()}
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    sections = {"run": {name: value for name, value in values.items() if name not in sections}, **sections}
    return "\n".join(f"{name:<12}{_values(section)}" for name, section in sections.items())


def _values(section: Mapping[str, Any]) -> str:
    """The values that are given."""
    words = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in section.items()}
    return ", ".join(f"{key} {word}" for key, word in words.items() if word not in (None, ""))


@verb
def plan(options: TrainOptions) -> TrainPlan:
    """What a run would be; its data need not be there where the recipe describes it. Nothing is written.

    Raises: as `train` does before its first step.
    """
    options = with_network_of_source(options)
    config, processes, run = options.config, launched_processes(), RunFolder(options.out)
    data = plan_data(config, run.path)
    architecture, metadata = describe(config, data)
    is_there = not isinstance(data, PlannedData)
    lora_parameters = _check_before_training(options, data, architecture, metadata, is_there=is_there)
    micro_batch = math.ceil(math.ceil(config.batch_size / processes) / config.processes.accumulation_steps)
    memory = training_memory(
        architecture, micro_batch, num_averages=len(config.ema_decays), processes=shard_size(config, processes),
        sharded=config.processes.sharding != "none", bfloat16=config.precision.autocast == "bfloat16",
        checkpoint_activations=config.processes.checkpoint_activations,
        accumulates=config.processes.accumulation_steps > 1, lora_parameters=lora_parameters,
    )
    device, cost = local_device(config.device), count(architecture)
    free = free_memory(device.type)
    rate = None
    if is_there and (free is None or memory.peak < free):
        with computing_threads(config.processes.threads):
            rate = processes * training_rate(architecture, micro_batch, device, config.precision.autocast == "bfloat16")
    warnings = _warnings(config, data, architecture, cost.parameters, max(run.steps(), default=0))
    if is_there and free is not None and memory.peak >= free:
        warnings.append(f"the run needs about {memory.peak / 2**30:.1f} GiB and {free / 2**30:.1f} are free here")
    return TrainPlan(
        options, architecture, metadata, data.name, len(data), cost, lora_parameters, memory, rate, processes,
        micro_batch, str(device), tuple(warnings),
    )


def _check_before_training(
    options: TrainOptions, data: TrainingSet, architecture: UNetConfig, metadata: ModelMetadata, *, is_there: bool
) -> int | None:
    """Raise what `train` would raise before its first step; returns the parameters of a LoRA, if there is one."""
    config, run = options.config, RunFolder(options.out)
    check_processes(config)
    teacher = loop.open_teacher(config, architecture, metadata, torch.device("cpu"))
    base = open_base(config, architecture)
    run.check(loop.described(config, data, teacher, base and base[1]))
    split_held_out(config.seed, len(data), config.watch.held_out)
    if config.start.source is not None and is_there and not run.names():
        check_start(config.start, architecture, metadata.label_names)
    _pictures(config, architecture, metadata, run, lambda progress: None)
    if base is None or config.lora.rank is None:
        return None
    modules = dict(base[0].named_modules())
    return count_parameters(modules, lora_layers(base[0], config.lora), config.lora.rank)
