"""The training loop: resume, then step by step forward, backward, update, callbacks, checkpoint.

It knows neither samplers nor scores: callbacks get a `StepState` after every optimizer step.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.config import UNetConfig
from lamamba.data.images import ImageSet
from lamamba.data.sets import TrainingSet
from lamamba.diffusion.guidance import drop_labels
from lamamba.diffusion.loss import training_loss
from lamamba.diffusion.schedule import make_schedule
from lamamba.inference.compiling import compile_network
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import TrainConfig
from lamamba.runs.folder import RunFolder, run_values
from lamamba.runs.lora import LoraBase
from lamamba.runs.metadata import ModelMetadata
from lamamba.training.checkpoint import (
    TrainState,
    averages_of,
    read_checkpoint,
    update_ema,
    whole_network,
    write_checkpoint,
)
from lamamba.training.data import Batch, TrainingData, as_training_set
from lamamba.training.distill import Teacher, VelocityTeacher
from lamamba.training.distributed import Processes, precision_policy
from lamamba.training.flow_map import FlowMapTask
from lamamba.training.interrupt import Interrupted, StopRequest, stop_signals
from lamamba.training.non_finite import find_origin
from lamamba.training.start import add_lora_layers, continue_official, open_base, start_network
from lamamba.training.trackers import MetricsFile
from lamamba.utils.distributed import local, peak_memory, whole
from lamamba.utils.errors import RankZeroError
from lamamba.utils.locks import FolderLock
from lamamba.utils.repeatable import computing_threads, own_random_state

logger = logging.getLogger("lamamba.training")

_alone = threading.RLock()
"""Held by the thread that trains."""
NAMED_FILES = 8
"""Files that a report of a non-finite loss names; the rest are counted."""


@dataclass(frozen=True)
class StepState:
    """State of the training after an optimizer step, as callbacks get it on every rank."""

    step: int
    """Optimizer steps done."""
    steps: int
    """Steps of the whole run."""
    loss: float
    """Mean loss of the step's images."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """Of this step."""
    images_per_second: float
    """Of all ranks, since training began in this process; without checkpoints and callbacks."""
    seconds: float
    """Since training began in this process."""
    peak_memory: int
    """Most bytes allocated so far by this process: on its GPU, or in all on a CPU."""
    ema: LaMambaUNet
    """The (first) averaged network, read-only; sharded where networks are."""
    whole_ema: Callable[[], LaMambaUNet | None]
    """The whole averaged network on rank 0, None on other ranks. A collective: all ranks must call it, or none."""


Callback = Callable[[StepState], None]


def describe(config: TrainConfig, data: ImageSet | TrainingSet) -> tuple[UNetConfig, ModelMetadata]:
    """The network that a run trains on this data, and the metadata saved with it.

    Raises:
        ValueError: when model and data do not fit.
    """
    samples, expected = as_training_set(data, config), config.data.expected_classes
    if expected is not None and expected != len(samples.label_names):
        raise ValueError(
            f"{samples.name} has {len(samples.label_names)} classes, data.expected_classes={expected}; give the data "
            "that the recipe was written for, or the number of yours"
        )
    label_names = samples.label_names if config.data.use_labels else ()
    architecture = config.model.build(
        channels=samples.channels, num_classes=len(label_names), input_size=samples.input_size
    )
    guidance = config.sampling.guidance
    if architecture.objective == "flow-map" and label_names:
        guidance = architecture.lowest_guidance if guidance is None else guidance
        architecture.check_guidance(guidance)
    metadata = ModelMetadata(
        objective=architecture.objective, image_size=samples.image_size, label_names=tuple(label_names),
        guidance=guidance if label_names else None, **vars(samples.codec),
    )
    return architecture, metadata


def open_teacher(
    config: TrainConfig, architecture: UNetConfig, metadata: ModelMetadata, device: torch.device
) -> Teacher | VelocityTeacher | None:
    """The network that a run learns from, if there is one.

    Raises:
        FileNotFoundError, ValueError: when it is missing, damaged, or does not fit the run's network.
    """
    if config.distill.teacher is None:
        return None
    kind = VelocityTeacher if architecture.objective == "flow-map" else Teacher
    return kind(config.distill, architecture, metadata, device)


def described(
    config: TrainConfig, samples: TrainingSet, teacher: Teacher | VelocityTeacher | None = None,
    base: LoraBase | None = None,
) -> dict[str, Any]:
    """The content of the run's config.json."""
    excluded = getattr(samples, "excluded", ())                                 # latents and digits have none
    values = run_values(config, *describe(config, samples), samples.fingerprint, excluded)
    if teacher is not None:
        values["teacher"] = {"sha256": teacher.sha256}
    return values if base is None else {**values, "base": {"sha256": base.base_sha256}}


def train(
    config: TrainConfig, data: ImageSet | TrainingSet, folder: str | Path, callbacks: Sequence[Callback] = (),
    on_resume: Sequence[Callback] = (),
) -> TrainState:
    """Train a network from its first step, or on from the folder's newest whole checkpoint, to the last.

    The same configuration gives the same run to the bit on one machine, however often it is stopped and resumed, and
    the same run to rounding at any world size. Under a launcher, every process calls this.

    Args:
        config: of the run.
        data: to train on.
        folder: of the run.
        callbacks: called after every optimizer step.
        on_resume: called once with the state of the checkpoint that the run goes on from, whose loss, gradient norm and
            learning rate are NaN: for what a stop between a checkpoint and the callbacks has left undone.

    Raises:
        ValueError: when configuration, data and folder do not fit together.
        BlockingIOError: when another job trains in the folder, or another thread of this process.
        FloatingPointError: when a loss or gradient is not finite and the configuration says to stop, or a limit is met;
            the weights were not touched by it.
        Interrupted: when a signal stopped the run, after a checkpoint.
        OSError: when the last checkpoint could not be written.
        RankZeroError: on the other ranks, when rank 0 raises.
    """
    if not _alone.acquire(blocking=False):
        raise BlockingIOError(
            "another thread of this process trains, and weights are drawn from one random state: wait for it, or start "
            "another process"
        )
    try:
        return _train(config, data, folder, callbacks, on_resume)
    finally:
        _alone.release()


def _train(
    config: TrainConfig, data: ImageSet | TrainingSet, folder: str | Path, callbacks: Sequence[Callback],
    on_resume: Sequence[Callback],
) -> TrainState:
    processes = Processes(config)
    samples = as_training_set(data, config)
    architecture, metadata = describe(config, samples)
    run, lock = RunFolder(folder), FolderLock(Path(folder))
    processes.on_rank_0(run.prepare)
    try:
        processes.on_rank_0(lock.acquire)
        threads = computing_threads(config.processes.threads)
        with own_random_state(), threads, precision_policy(config.precision), stop_signals() as request:
            teacher = open_teacher(config, architecture, metadata, processes.device)
            base = open_base(config, architecture)
            files = getattr(samples, "source_files", ())
            values = described(config, samples, teacher, base and base[1])
            processes.on_rank_0(lambda: run.create(values, files))
            trainer = _Trainer(config, samples, architecture, metadata, run, processes, teacher, base)
            return trainer.run(callbacks, on_resume, request)
    finally:
        lock.release()


@dataclass(frozen=True)
class _StepResult:
    """Of a forward and backward pass over a batch, agreed by all ranks."""

    loss: float
    """Mean over the batch."""
    terms: dict[str, float]
    """Mean of each term of a distillation's loss, unweighted; empty without a teacher."""
    grad_norm: float
    is_finite: bool
    is_stop_requested: bool


class _Trainer:
    """One call of `train`: network, averages, optimizer and data, and the loop over them."""

    def __init__(
        self, config: TrainConfig, samples: TrainingSet, architecture: UNetConfig, metadata: ModelMetadata,
        folder: RunFolder, processes: Processes, teacher: Teacher | VelocityTeacher | None,
        base: tuple[LaMambaUNet, LoraBase] | None,
    ):
        self._teacher = teacher if isinstance(teacher, Teacher) else None
        self._config, self._samples, self._null_label = config, samples, architecture.num_classes
        self._metadata, self._folder, self._processes = metadata, folder, processes
        self._data = TrainingData(samples, config, processes)
        loss = config.loss
        self._schedule = make_schedule(architecture.objective, loss.timesteps, loss.logit_mean, loss.logit_deviation)
        self._gamma = loss.min_snr_gamma if loss.weighting == "min-snr" else None
        self._flow_map: FlowMapTask | None = None
        if architecture.objective == "flow-map":
            velocity = teacher if isinstance(teacher, VelocityTeacher) else None
            self._flow_map = FlowMapTask(config.flow_map, architecture, self._schedule, velocity)

        torch.manual_seed(config.seed)                                          # the same weights on every rank
        model = self._initial_network(architecture, base).to(processes.device).train()
        averages = averages_of(model, config.ema_decays)
        if config.processes.checkpoint_activations:
            model.enable_gradient_checkpointing()
        if config.processes.compile:
            compile_network(model)
        self._network = processes.distribute(model, list(averages.values()))    # what a step calls
        options = config.optimizer
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad], lr=options.learning_rate,
            betas=options.betas, weight_decay=options.weight_decay, fused=True,
        )
        self._state = TrainState(model, averages, optimizer, base and base[1])

    def _initial_network(self, architecture: UNetConfig, base: tuple[LaMambaUNet, LoraBase] | None) -> LaMambaUNet:
        """The network before the first step, or one to read a checkpoint into."""
        if base is not None:
            network, _ = base
            add_lora_layers(network, self._config.lora)
            return network
        start = self._config.start
        takes_weights = start.source is not None and start.mode == "weights"
        takes_weights &= not self._processes.broadcast(self._folder.names())    # a restart has better ones
        if not takes_weights:
            return LaMambaUNet(architecture)
        return start_network(start, architecture, self._metadata.label_names)

    def run(self, callbacks: Sequence[Callback], on_resume: Sequence[Callback], request: StopRequest) -> TrainState:
        """Train from the newest checkpoint, or from the start, to the last step."""
        config, state = self._config, self._state
        is_resumed = self._begin()
        self._clock = _Clock(config.batch_size, state.step)
        with self._clock.paused():
            for callback in on_resume if is_resumed else ():
                callback(self._step_state(math.nan, math.nan, math.nan))
        data = self._data.micro_batches(state.next_batch)
        metrics_file = MetricsFile(self._folder, config, is_rank_zero=self._processes.is_rank_zero)
        with metrics_file as metrics, data as batches:
            metrics.remove_after(state.step)
            while state.step < config.steps:
                batch = [next(batches) for _ in range(config.processes.accumulation_steps)]
                result = self._forward_backward(batch, request)
                checkpoint = None
                if result.is_finite:
                    self._update(result)
                    checkpoint = self._after_step(result, callbacks, metrics)
                else:
                    self._handle_non_finite(batch, result, metrics)
                if result.is_stop_requested and state.step < config.steps:
                    self._stop(request, checkpoint)
        self._log_event("finished", step=state.step)
        return state

    def _begin(self) -> bool:
        """Resume from the newest checkpoint (True), or start: from fresh weights or an official checkpoint."""
        if self._restore():
            return True
        if self._config.start.mode == "everything":
            continue_official(Path(str(self._config.start.source)), self._state)
        if self._config.faults.on_non_finite == "back":                         # there must be something to go back to
            self._save(must=True)
        return False

    def _step_state(self, loss: float, grad_norm: float, rate: float) -> StepState:
        state, clock = self._state, self._clock
        return StepState(
            state.step, self._config.steps, loss, grad_norm, rate, clock.rate, clock.seconds,
            peak_memory(self._processes.device), state.ema, lambda: whole_network(state.ema, self._processes),
        )

    def _losses(self, batch: Batch, network: nn.Module) -> Tensor:
        """Each sample's loss, (b,)."""
        return self._weighted(self._terms(batch, network))

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss of its terms: (b,)."""
        if self._teacher is None:
            return terms["task"]
        weights = self._config.distill.weights()
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(0)

    def _terms(self, batch: Batch, network: nn.Module) -> dict[str, Tensor]:
        """Each sample's loss by term, (b,): "task", and with a teacher "output" and "feature"."""
        device = self._processes.device
        x0, eps = batch.x0.to(device, non_blocking=True), batch.eps.to(device, non_blocking=True)
        if self._flow_map is not None:
            return {"task": self._flow_map_losses(self._flow_map, batch, network, x0, eps)}
        t = self._schedule.timestep(batch.time).to(device)                      # (b,)
        xt = self._schedule.add_noise(x0, eps, t)                               # (b, c, h, w)
        labels = None
        if self._null_label:
            labels = drop_labels(batch.labels, batch.label_draw, self._config.label_dropout, self._null_label)
            labels = labels.to(device)
        with self._processes.autocast():
            features: tuple[Tensor, ...] = ()
            if self._teacher is not None and self._teacher.needs_features:
                output, features = network(xt, t, labels, return_features=True)
            else:
                output = network(xt, t, labels)                                 # (b, out_channels, h, w)
            learned = {} if self._teacher is None else self._teacher.terms(xt, t, labels, output, features)
        return {"task": training_loss(output.float(), x0, xt, t, eps, self._schedule, self._gamma), **learned}

    def _flow_map_losses(self, task: FlowMapTask, batch: Batch, network: nn.Module, x0: Tensor, eps: Tensor) -> Tensor:
        """Each sample's loss, (b,), against targets of the average that lags least."""
        average = self._state.averages[min(self._state.averages)]
        labels = batch.labels.to(x0.device) if self._null_label else None
        with self._processes.autocast():
            losses = task.losses(network, average, x0, eps, batch.time, batch.flow_map, labels)
        if self._processes.is_sharded:
            average.reshard()
        return losses

    def _forward_backward(self, batch: list[Batch], request: StopRequest) -> _StepResult:
        """Accumulate the gradient of a batch over its micro-batches, on every rank."""
        config, state, processes = self._config, self._state, self._processes
        state.optimizer.zero_grad(set_to_none=True)
        totals, parts = [], []
        for number, micro_batch in enumerate(batch):
            with processes.accumulate(self._network, is_last=number == len(batch) - 1):
                terms = self._terms(micro_batch, self._network)
                losses = self._weighted(terms)
                # DDP and FSDP take the mean over ranks; the sum over all of them, over the batch, is wanted
                (losses.sum() * (processes.world_size / config.batch_size)).backward()
            totals.append(losses.detach().sum())
            parts.append([] if self._teacher is None else [term.detach().sum() for term in terms.values()])
        total = float(torch.stack(totals).sum())
        norm = float(whole(nn.utils.clip_grad_norm_(state.model.parameters(), config.optimizer.max_grad_norm)))
        is_wrong = not (math.isfinite(total) and math.isfinite(norm))
        sums = [float(sum(part)) for part in zip(*parts, strict=True)]
        total, faults, stops, *sums = processes.sum(total, float(is_wrong), float(request.name is not None), *sums)
        means = {f"{name}_loss": value / config.batch_size for name, value in zip(terms, sums, strict=False)}
        return _StepResult(total / config.batch_size, means, norm, faults == 0, stops > 0)

    def _update(self, result: _StepResult) -> None:
        state = self._state
        for group in state.optimizer.param_groups:
            group["lr"] = self._config.learning_rate_at(state.step)
        state.optimizer.step()
        for decay, average in state.averages.items():
            update_ema(average, state.model, decay)
        state.step += 1
        self._clock.tick(state.step, {"loss": result.loss, **result.terms})

    def _after_step(self, result: _StepResult, callbacks: Sequence[Callback], metrics: MetricsFile) -> Path | None:
        """Measure, log, save and call back, each when it is due; returns the checkpoint, if one was written."""
        config, state, clock, checkpoint = self._config, self._state, self._clock, None
        is_last = state.step == config.steps
        rate, held_out = state.optimizer.param_groups[0]["lr"], dict[str, float]()
        if config.watch.held_out and (state.step % config.watch.held_out_every == 0 or is_last):
            with clock.paused():
                held_out = self._held_out_losses()
        if state.step % config.log_every == 0 or is_last or held_out:
            metrics.write(clock.line(state.step) | {
                "grad_norm": result.grad_norm, "learning_rate": rate,
                "peak_memory_bytes": peak_memory(self._processes.device), **held_out,
            })
        step_state = self._step_state(result.loss, result.grad_norm, rate)
        with clock.paused():
            if state.step % config.checkpoint_every == 0 or is_last:
                checkpoint = self._save(must=is_last)
            for callback in callbacks:
                callback(step_state)
        return checkpoint

    def _stop(self, request: StopRequest, checkpoint: Path | None) -> None:
        """Save where that is not done yet, and raise Interrupted."""
        step, processes = self._state.step, self._processes
        checkpoint = checkpoint or self._save(must=True)
        name = next((name for name in processes.gather(request.name) if name), "a signal")
        self._log_event("stopped", signal=name, step=step)
        raise Interrupted(name, step, checkpoint)

    def _handle_non_finite(self, batch: list[Batch], result: _StepResult, metrics: MetricsFile) -> None:
        """Report a step that was not finite, then stop, skip it or go back. No rank has updated anything."""
        state, options = self._state, self._config.faults
        number = state.next_batch
        report = self._report(batch, result)
        newest = self._folder.names()[-1:] or ["none yet"]
        last = f" Last checkpoint: {newest[0]}."
        hint = " A lower optimizer.learning_rate or optimizer.max_grad_norm=1 often helps"
        self._log_event("not finite", step=state.step + 1, batch=number, policy=options.on_non_finite, report=report)
        if options.on_non_finite == "stop":
            raise FloatingPointError(report + last + hint)
        if state.faults >= options.max_skips:
            limit = f" There were {state.faults} before it, and faults.max_skips={options.max_skips}."
            raise FloatingPointError(report + limit + last + hint)
        state.faults += 1
        if options.on_non_finite == "skip":
            state.omitted += 1
            self._warn("%s The batch is skipped (%d of %d)", report, state.faults, options.max_skips)
            return
        faults = state.faults
        self._restore()
        state.faults, state.omitted = faults, number + 1 - state.step
        metrics.remove_after(state.step)
        self._warn("%s Back to step %d; the batches since are omitted", report, state.step)

    def _report(self, batch: list[Batch], result: _StepResult) -> str:
        """The samples on each rank, and the module where numbers stopped being finite."""
        state, processes = self._state, self._processes
        wrong = [name for name, p in state.model.named_parameters() if p.grad is not None
                 and not local(p.grad).isfinite().all()]
        mine = []
        for micro_batch in batch:
            agree = (lambda one: processes.sum(float(one))[0] > 0) if processes.is_sharded else bool
            origin, rows = find_origin(state.model, functools.partial(self._losses, micro_batch, state.model), agree)
            if origin is not None:
                files = self._samples.files([micro_batch.indices[row] for row in rows] or micro_batch.indices)
                more = f" and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
                mine.append(f"rank {processes.rank}: {origin}; samples {', '.join(files[:NAMED_FILES])}{more}")
        found = [line for lines in processes.gather(mine) for line in lines]
        if not found:
            first = f" (first seen in {wrong[0]})" if wrong else ""
            found = [f"the same batch is finite when run again{first}: the hardware may be at fault"]
        return (
            f"step {state.step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; the weights were not "
            f"touched. {'; '.join(found)}."
        )

    @torch.no_grad()
    def _held_out_losses(self) -> dict[str, float]:
        """Mean loss of the averaged network on held-out images, at fixed times and noise, and of its terms."""
        config, processes, totals = self._config, self._processes, collections.defaultdict[str, float](float)
        micro_batches = processes.world_size * config.processes.accumulation_steps
        for batch, count in self._data.held_out(max(1, config.batch_size // micro_batches)):
            terms = self._terms(batch, self._state.ema)
            named = {"held_out_loss": self._weighted(terms)}
            if self._teacher is not None:
                named |= {f"held_out_{name}_loss": term for name, term in terms.items()}
            for name, losses in named.items():
                totals[name] += float(losses[:count].sum())
        if processes.is_sharded:
            self._state.ema.reshard()
        sums = processes.sum(*totals.values())
        return {name: value / config.watch.held_out for name, value in zip(totals, sums, strict=True)}

    def _restore(self) -> bool:
        """Go to the newest whole checkpoint; returns whether there is one."""
        processes = self._processes
        checkpoint = processes.broadcast(processes.on_rank_0(self._folder.newest_whole))
        if checkpoint is None:
            self._log_event("started", processes=processes.world_size)
            return False
        read_checkpoint(checkpoint, self._state, processes)
        self._log_event("resumed", step=self._state.step, checkpoint=checkpoint.name, processes=processes.world_size)
        return True

    def _save(self, *, must: bool) -> Path | None:
        """Write a checkpoint; unless it must succeed, a failure is logged and training goes on."""
        config, state, processes = self._config, self._state, self._processes
        setup = {
            "processes": processes.world_size, "device": str(processes.device), "torch": torch.__version__,
            "precision": dataclasses.asdict(config.precision), "sharding": config.processes.sharding,
        }
        began = time.perf_counter()
        try:
            checkpoint = self._folder.save(
                state.step, lambda folder: write_checkpoint(folder, state, self._metadata, processes, setup),
                processes, keep=config.keep_checkpoints, keep_every=config.keep_every,
            )
        except (OSError, RankZeroError) as error:
            if must:
                raise
            self._warn("%s. Training goes on", error)
            self._log_event("not saved", step=state.step, reason=str(error))
            return None
        self._log_event("saved", step=state.step, seconds=round(time.perf_counter() - began, 3))
        return checkpoint

    def _log_event(self, event: str, **values: object) -> None:
        if self._processes.is_rank_zero:
            self._folder.log_event(event, **values)

    def _warn(self, message: str, *values: object) -> None:
        if self._processes.is_rank_zero:
            logger.warning(message, *values)


class _Clock:
    """Loss and speed since the last line of metrics and since the beginning, without the time while `paused`."""

    def __init__(self, batch_size: int, first_step: int):
        self._batch_size, self._first_step = batch_size, first_step
        self._began, self._paused = time.perf_counter(), 0.0
        self._line_step, self._line_seconds, self._losses = first_step, 0.0, list[dict[str, float]]()
        self.rate = self.seconds = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around checkpoints and callbacks."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def tick(self, step: int, losses: dict[str, float]) -> None:
        """Count a step."""
        self._losses.append(losses)
        self.seconds = time.perf_counter() - self._began
        self.rate = max(0, step - self._first_step) * self._batch_size / max(self.seconds - self._paused, 1e-9)

    def line(self, step: int) -> dict[str, float]:
        """Mean losses and images per second since the last line."""
        training = self.seconds - self._paused
        rate = max(0, step - self._line_step) * self._batch_size / max(training - self._line_seconds, 1e-9)
        losses = {name: sum(each[name] for each in self._losses) / len(self._losses) for name in self._losses[0]}
        self._line_step, self._line_seconds, self._losses = step, training, []
        return {"step": step, **losses, "images_per_second": round(rate, 2), "seconds": round(self.seconds, 2)}
