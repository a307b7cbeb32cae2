"""lamamba.train: a training run, from its options; `plan`: what a run would be."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamamba.benchmarking.flops import Cost, count
from lamamba.benchmarking.memory import TrainingMemory, training_memory
from lamamba.config import UNetConfig
from lamamba.data.images import ImageSet
from lamamba.data.sets import TrainingSet
from lamamba.evaluation.callbacks import QuickScore, SampleGrid, open_decoder
from lamamba.options.base import verb
from lamamba.options.training import TrainConfig, TrainOptions
from lamamba.runs.folder import RunFolder
from lamamba.runs.metadata import ModelMetadata
from lamamba.training import loop
from lamamba.training.checkpoint import TrainState
from lamamba.training.loop import Callback, StepState, describe
from lamamba.training.sources import open_data, plan_data
from lamamba.utils.distributed import is_main_process, launched_processes, local_device, pick_device
from lamamba.utils.progress import Progress, ProgressOption, Report, is_watched, reporting

logger = logging.getLogger("lamamba.api")

LOG_LINES = 20
"""Log lines of a run without a terminal or notebook."""


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
        bad = RunFolder(self.folder).bad_images
        note = f"{self.bad_images} files could not be read, replaced by others: {bad}\n" if self.bad_images else ""
        return f"{note}done: {self.folder}\nsample it: lamamba sample {self.folder} --out grid.png"

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
        BlockingIOError: when another job trains in the folder.
        FloatingPointError: when a loss or gradient is not finite, and the options say to stop.
        Interrupted: when a signal stopped the run, after a checkpoint.
        MainProcessError: on the other ranks, when rank 0 raises.
    """
    config, run, is_main = options.config, RunFolder(options.out), is_main_process()
    data = open_data(config, run.path) if data is None else data
    architecture, metadata = describe(config, data)
    pictures = _pictures(config, metadata, run, is_main)
    resumed = int(run.names()[-1].removeprefix("step_")) if run.names() else 0
    if is_main:
        _announce(config, data, architecture, run, resumed)
    with _showing(progress if is_main else None, resumed) as show:
        state = loop.train(config, data, run.path, [show, *pictures, *callbacks])
    bad = run.bad_images.read_text(encoding="utf-8").splitlines() if run.bad_images.is_file() else []
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else []
    return TrainResult(
        run.path, state.step, run.checkpoints / run.names()[-1], json.loads(lines[-1]) if lines else {}, len(bad), state
    )


def _pictures(config: TrainConfig, metadata: ModelMetadata, run: RunFolder, is_main: bool) -> list[Callback]:
    """Callbacks for sample grids and quick scores; rank 0 samples, the others help to gather a sharded network."""
    sampling, score, device = config.sampling, config.score, local_device(config.device)
    decoder = open_decoder(metadata, device) if is_main and (sampling.every or score.every) else None
    callbacks: list[Callback] = [SampleGrid(sampling, run.samples, metadata.label_names, decoder)]
    if score.every:
        callbacks.append(
            QuickScore(score, sampling, run.scores, metadata.image_size, decoder, device, is_main=is_main)
        )
    return callbacks


def _announce(
    config: TrainConfig, data: ImageSet | TrainingSet, architecture: UNetConfig, run: RunFolder, resumed: int
) -> None:
    parameters = count(architecture).parameters / 1e6
    logger.info(
        f"{run.path}: {len(data):,} images of {data.name}, {architecture.num_classes or 'no'} classes, "
        f"{parameters:.2f} M parameters"
    )
    if resumed:
        logger.info(f"resuming at step {resumed}")
    for warning in config.warnings():
        logger.warning(warning)


@contextlib.contextmanager
def _showing(progress: ProgressOption, resumed: int) -> Iterator[Callback]:
    """A callback that reports progress, or, for "auto" without a terminal or notebook, logs some lines."""
    if progress == "auto" and not is_watched():
        yield _LogLines(resumed)
    else:
        with reporting(progress) as report:
            yield _ProgressReport(report, resumed)


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
    """Logs about twenty lines over the whole run."""

    def __init__(self, resumed: int):
        super().__init__(lambda progress: None, resumed)

    def __call__(self, state: StepState) -> None:
        note = self._note(state, "gradient norm")
        if state.step % max(1, state.steps // LOG_LINES) and state.step != state.steps:
            return
        left = state.seconds / max(1, state.step - self._resumed) * (state.steps - state.step)
        logger.info(
            f"step {state.step}/{state.steps}  {note}  {state.seconds:.0f} s, {left:.0f} s left"
        )


@dataclass(frozen=True)
class TrainPlan:
    """What a run would be: network, cost, memory, epochs and learning rate."""

    options: TrainOptions
    architecture: UNetConfig
    metadata: ModelMetadata
    data: str
    """Name of the data."""
    images: int
    """Number of its images."""
    cost: Cost
    memory: TrainingMemory
    """On each device."""
    processes: int
    micro_batch: int
    """Images of a process at a time."""
    device: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        config, architecture, cost, memory = self.options.config, self.architecture, self.cost, self.memory
        plural = "s" if self.micro_batch > 1 else ""
        per_epoch = self.images / config.batch_size
        group = "1 process" if self.processes == 1 else f"{self.processes} processes"
        latents = ""
        if self.metadata.codec == "latents":
            shape = " x ".join(map(str, (architecture.in_channels, *architecture.input_size)))
            latents = f", as latents ({shape}) of {self.metadata.autoencoder or 'an autoencoder'}"
        values = json.dumps({"train": config.to_dict(), "architecture": architecture.to_dict()}, indent=2)
        plan = f"""\
{values}

run folder        {self.options.out}
data              {self.data}: {self.images:,} images, {config.data.image_size} x {config.data.image_size}{latents}
device            {self.device}, {group}
parameters        {cost.parameters / 1e6:.2f} M
multiply-adds     {cost.matrix / 1e9:.3f} G per image and forward pass, and {cost.scan / 1e9:.3f} G of the scan
memory            about {memory.peak / 2**30:.2f} GiB on each device: {memory.state / 2**30:.2f} weights, averages and \
optimizer, {memory.step / 2**30:.2f} for a step of {self.micro_batch} image{plural} at a time
step              {config.batch_size} images = {group} x {config.processes.accumulation_steps} x {self.micro_batch}
run               {config.steps:,} steps, {per_epoch:,.1f} steps per epoch: {config.steps / per_epoch:,.1f} epochs
learning rate     {config.schedule_in_words()}"""
        return "\n".join([plan, *(f"warning: {warning}" for warning in self.warnings)])


@verb
def plan(options: TrainOptions) -> TrainPlan:
    """What a run would be; its data need not be there where the recipe describes it. Nothing is written.

    Raises:
        OSError, ValueError: when data and configuration do not fit together.
    """
    config, processes = options.config, launched_processes()
    data = plan_data(config)
    architecture, metadata = describe(config, data)
    micro_batch = math.ceil(math.ceil(config.batch_size / processes) / config.processes.accumulation_steps)
    memory = training_memory(
        architecture, micro_batch, num_averages=len(config.ema_decays), processes=processes,
        sharded=config.processes.sharding == "full", bfloat16=config.precision.autocast == "bfloat16",
        checkpoint_activations=config.processes.checkpoint_activations,
        accumulates=config.processes.accumulation_steps > 1,
    )
    return TrainPlan(
        options, architecture, metadata, data.name, len(data), count(architecture), memory, processes, micro_batch,
        str(pick_device(config.device)), tuple(config.warnings()),
    )
