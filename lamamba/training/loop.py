"""The training loop. It knows neither samplers nor scores: callbacks are told of every step and look for themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from lamamba.runs.folder import RunFolder
from lamamba.runs.metadata import ModelMetadata
from lamamba.training.checkpoint import (
    TrainState,
    averages_of,
    read_checkpoint,
    update_ema,
    whole_network,
    write_checkpoint,
)
from lamamba.training.data import Batch, Feed, as_training_set
from lamamba.training.distributed import Processes, precision_policy
from lamamba.training.interrupt import Interrupted, StopRequest, listening
from lamamba.training.non_finite import find_origin
from lamamba.training.start import continue_official, start_network
from lamamba.training.trackers import start_trackers
from lamamba.utils.distributed import MainProcessError, local, peak_memory, whole
from lamamba.utils.distributed import pick_device as pick_device
from lamamba.utils.files import write_atomically
from lamamba.utils.locks import FolderLock

logger = logging.getLogger("lamamba.training")

NAMED_FILES = 8
"""Files that a report of a fault names; the rest are counted."""


@dataclass(frozen=True)
class StepState:
    """What callbacks are told after every optimizer step, on every process."""

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
    """Trained on, by all processes together, since this one began; checkpoints, pictures and scores do not count."""
    seconds: float
    """Since this process began to train."""
    peak_memory: int
    """Most bytes held so far by this process: on its GPU, or in all on a CPU."""
    ema: LaMambaUNet
    """The (first) averaged network, to look at, not to change; in pieces where networks are split among processes."""
    whole_ema: Callable[[], LaMambaUNet | None]
    """The averaged network in one piece, on the main process only. All processes must ask, or none."""


Callback = Callable[[StepState], None]


def describe(config: TrainConfig, data: ImageSet | TrainingSet) -> tuple[UNetConfig, ModelMetadata]:
    """The network that a run trains on this data, and what its samplers will need to know.

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
    facts = ModelMetadata(
        objective=architecture.objective, image_size=samples.image_size, label_names=tuple(label_names),
        guidance=config.sampling.guidance if label_names else None, **vars(samples.codec),
    )
    return architecture, facts


def train(
    config: TrainConfig, data: ImageSet | TrainingSet, folder: str | Path, callbacks: Sequence[Callback] = ()
) -> TrainState:
    """Train a network from its first step, or on from the folder's newest whole checkpoint, to the last.

    The same configuration gives the same run to the bit on one machine, however often it is stopped and resumed, and
    the same run to rounding on any number of processes. Under a launcher, every process calls this.

    Raises:
        ValueError: when configuration, data and folder do not fit together.
        BlockingIOError: when another job trains in the folder.
        FloatingPointError: when a loss or gradient is not finite and the configuration says to stop, or a limit is met;
            the weights were not touched by it.
        Interrupted: when a signal asked the run to stop and it has written a checkpoint.
        OSError: when the last checkpoint could not be written.
        MainProcessError: on the other processes, when the main process raises.
    """
    processes = Processes(config)
    samples = as_training_set(data, config)
    architecture, facts = describe(config, samples)
    run, lock = RunFolder(folder), FolderLock(Path(folder))
    processes.together(run.prepare)
    try:
        processes.together(lock.acquire)
        with precision_policy(config.precision), listening() as request:
            left_out = getattr(samples, "excluded", ())                         # latents and digits know of none
            processes.together(lambda: run.create(config, architecture, facts, samples.fingerprint, left_out))
            return _Training(config, samples, architecture, facts, run, processes).run(callbacks, request)
    finally:
        lock.release()


class _Training:
    """One call of `train`: its parts, put together, and the loop over them."""

    def __init__(
        self, config: TrainConfig, samples: TrainingSet, architecture: UNetConfig, facts: ModelMetadata,
        folder: RunFolder, processes: Processes,
    ):
        self._config, self._samples, self._architecture = config, samples, architecture
        self._facts, self._folder, self._processes = facts, folder, processes
        self._feed = Feed(samples, config, processes)
        loss = config.loss
        self._schedule = make_schedule(architecture.objective, loss.timesteps, loss.logit_mean, loss.logit_deviation)
        self._gamma = loss.min_snr_gamma if loss.weighting == "min-snr" else None

        torch.manual_seed(config.seed)                                          # the same weights on every process
        takes_weights = config.start.source is not None and config.start.mode == "weights"
        takes_weights &= not processes.broadcast(folder.names())                # a restart has better ones
        network = start_network(config.start, architecture) if takes_weights else LaMambaUNet(architecture)
        model = network.to(processes.device).train()
        averages = averages_of(model, config.ema_decays)
        if config.processes.checkpoint_activations:
            model.enable_gradient_checkpointing()
        if config.processes.compile:
            compile_network(model)
        self._network = processes.distribute(model, list(averages.values()))    # what a step calls
        options = config.optimizer
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay,
            fused=True,
        )
        self.state = TrainState(model, averages, optimizer)

    def run(self, callbacks: Sequence[Callback], request: StopRequest) -> TrainState:
        """Resume, then step by step: forward, backward, agree with the others, update, tell, save."""
        config, state, processes, folder = self._config, self.state, self._processes, self._folder
        if not self._restore():
            if config.start.mode == "everything":
                continue_official(Path(str(config.start.source)), state)
            if config.faults.on_non_finite == "back":                           # there must be something to go back to
                self._save(must=True)
        feed = self._feed.pieces(state.step + state.left_out)
        clock = _Clock(config.batch_size, state.step)
        with _MetricsFile(folder, config, state.step, processes) as metrics:
            while state.step < config.steps:
                batches = [next(feed) for _ in range(config.processes.accumulation_steps)]
                value, norm, is_finite, is_asked = self._accumulate(batches, request)
                if not is_finite:
                    self._meet_fault(batches, value, norm, metrics)
                else:
                    self._update()
                    clock.tick(state.step, value)
                is_last = state.step == config.steps
                saved = None
                if is_finite:
                    held_out = {}
                    if config.watch.held_out and (state.step % config.watch.held_out_every == 0 or is_last):
                        with clock.aside():
                            held_out = {"held_out_loss": self._held_out_loss()}
                    if state.step % config.log_every == 0 or is_last or held_out:
                        metrics.write(clock.line(state.step) | {
                            "grad_norm": norm, "learning_rate": self._rate,
                            "peak_memory_bytes": peak_memory(processes.device), **held_out,
                        })
                    moment = StepState(
                        state.step, config.steps, value, norm, self._rate, clock.rate, clock.seconds,
                        peak_memory(processes.device), state.ema, lambda: whole_network(state.ema, processes),
                    )
                    with clock.aside():
                        if state.step % config.checkpoint_every == 0 or is_last:
                            saved = self._save(must=is_last)
                        for callback in callbacks:
                            callback(moment)
                if is_asked and not is_last:
                    saved = saved or self._save(must=True)
                    name = next((name for name in processes.gather(request.name) if name), "a signal")
                    self._note("stopped", signal=name, step=state.step)
                    raise Interrupted(name, state.step, saved)
        self._note("finished", step=state.step)
        return state

    def _losses(self, batch: Batch, network: nn.Module) -> Tensor:
        """Each sample's loss, (b,)."""
        config, device, null_label = self._config, self._processes.device, self._architecture.num_classes
        x0, eps = batch.x0.to(device, non_blocking=True), batch.eps.to(device, non_blocking=True)
        t = self._schedule.timestep(batch.time).to(device)
        xt = self._schedule.add_noise(x0, eps, t)                               # (b, c, h, w)
        labels = None
        if null_label:
            labels = drop_labels(batch.labels, batch.label_draw, config.label_dropout, null_label).to(device)
        with self._processes.autocast():
            output = network(xt, t, labels)                                     # (b, out_channels, h, w)
        return training_loss(output.float(), x0, xt, t, eps, self._schedule, self._gamma)

    def _accumulate(self, batches: list[Batch], request: StopRequest) -> tuple[float, float, bool, bool]:
        """Gradients of the whole batch on every process: (mean loss, gradient norm, all finite, asked to stop)."""
        config, state, processes = self._config, self.state, self._processes
        state.optimizer.zero_grad(set_to_none=True)
        totals = []
        for number, batch in enumerate(batches):
            with processes.accumulate(self._network, is_last=number == len(batches) - 1):
                losses = self._losses(batch, self._network)
                # DDP and FSDP take the mean over processes; the sum over all of them, over the batch, is wanted
                (losses.sum() * (processes.count / config.batch_size)).backward()
            totals.append(losses.detach().sum())
        total = float(torch.stack(totals).sum())
        norm = float(whole(nn.utils.clip_grad_norm_(state.model.parameters(), config.optimizer.max_grad_norm)))
        all_losses, faults, asked = processes.sum(
            total, float(not (math.isfinite(total) and math.isfinite(norm))), float(request.name is not None)
        )
        return all_losses / config.batch_size, norm, faults == 0, asked > 0

    @property
    def _rate(self) -> float:
        return self.state.optimizer.param_groups[0]["lr"]

    def _update(self) -> None:
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = self._config.learning_rate_at(state.step)
        state.optimizer.step()
        for decay, average in state.averages.items():
            update_ema(average, state.model, decay)
        state.step += 1

    def _meet_fault(self, batches: list[Batch], value: float, norm: float, metrics: _MetricsFile) -> None:
        """Report a step that was not finite, and do as the configuration says. No process has updated anything."""
        state, options = self.state, self._config.faults
        number = state.step + state.left_out
        report = self._report(batches, value, norm)
        newest = self._folder.names()[-1:] or ["none yet"]
        last = f" Last checkpoint: {newest[0]}."
        hint = " A lower --optimizer.learning-rate or --optimizer.max-grad-norm 1 often helps"
        self._note("not finite", step=state.step + 1, batch=number, policy=options.on_non_finite, report=report)
        if options.on_non_finite == "stop":
            raise FloatingPointError(report + last + hint)
        if state.faults >= options.max_skips:
            limit = f" There were {state.faults} before it, and faults.max_skips={options.max_skips}."
            raise FloatingPointError(report + limit + last + hint)
        state.faults += 1
        if options.on_non_finite == "skip":
            state.left_out += 1
            self._warn("%s The batch is skipped (%d of %d)", report, state.faults, options.max_skips)
            return
        faults = state.faults
        self._restore()
        state.faults, state.left_out = faults, number + 1 - state.step
        metrics.forget_after(state.step)
        self._warn("%s Back to step %d; the batches since are left out", report, state.step)

    def _report(self, batches: list[Batch], value: float, norm: float) -> str:
        """Which samples on which process, and where it began."""
        state, processes = self.state, self._processes
        wrong = [name for name, p in state.model.named_parameters() if p.grad is not None
                 and not local(p.grad).isfinite().all()]
        mine = []
        for batch in batches:
            agree = (lambda one: processes.sum(float(one))[0] > 0) if processes.is_sharded else bool
            origin, rows = find_origin(state.model, functools.partial(self._losses, batch, state.model), agree)
            if origin is not None:
                indices = [batch.indices[row] for row in rows] or batch.indices
                files = self._samples.files(indices)
                more = f" and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
                mine.append(f"process {processes.index}: {origin}; samples {', '.join(files[:NAMED_FILES])}{more}")
        found = [line for lines in processes.gather(mine) for line in lines]
        if not found:
            first = f" (first seen in {wrong[0]})" if wrong else ""
            found = [f"the same batch is finite when run again{first}: the hardware may be at fault"]
        return (
            f"step {state.step + 1}: loss {value}, gradient norm {norm}; the weights were not touched. "
            f"{'; '.join(found)}."
        )

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean loss of the averaged network on images never trained on, at times and noise that stay the same."""
        config, total = self._config, 0.0
        pieces = self._processes.count * config.processes.accumulation_steps
        for batch, counted in self._feed.held_out(max(1, config.batch_size // pieces)):
            total += float(self._losses(batch, self.state.ema)[:counted].sum())
        if self._processes.is_sharded:
            self.state.ema.reshard()
        (everyone,) = self._processes.sum(total)
        return everyone / config.watch.held_out

    def _restore(self) -> bool:
        """Go to the newest whole checkpoint; whether there is one."""
        place = self._processes.broadcast(self._processes.together(self._folder.newest_whole))
        if place is None:
            self._note("started", processes=self._processes.count)
            return False
        read_checkpoint(place, self.state, self._processes)
        self._note("resumed", step=self.state.step, checkpoint=place.name, processes=self._processes.count)
        return True

    def _save(self, *, must: bool) -> Path | None:
        """Write a checkpoint. A failure is told and forgiven unless this is the last chance: training can go on."""
        config, state, processes = self._config, self.state, self._processes
        setup = {
            "processes": processes.count, "device": str(processes.device), "torch": torch.__version__,
            "precision": dataclasses.asdict(config.precision), "sharding": config.processes.sharding,
        }
        began = time.perf_counter()
        try:
            place = self._folder.save(
                state.step, lambda place: write_checkpoint(place, state, self._facts, processes, setup), processes,
                keep=config.keep_checkpoints, keep_every=config.keep_every,
            )
        except (OSError, MainProcessError) as error:
            if must:
                raise
            self._warn("%s. Training goes on", error)
            self._note("not saved", step=state.step, reason=str(error))
            return None
        self._note("saved", step=state.step, seconds=round(time.perf_counter() - began, 3))
        return place

    def _note(self, what: str, **facts: object) -> None:
        if self._processes.is_main:
            self._folder.note(what, **facts)

    def _warn(self, message: str, *values: object) -> None:
        if self._processes.is_main:
            logger.warning(message, *values)


class _Clock:
    """Losses and speed since the last line, and since the beginning; what `aside` holds does not slow training down."""

    def __init__(self, batch_size: int, first_step: int):
        self._batch_size, self._first_step = batch_size, first_step
        self._began, self._aside = time.perf_counter(), 0.0
        self._line_step, self._line_seconds, self._losses = first_step, 0.0, list[float]()
        self.rate = self.seconds = 0.0

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time for checkpoints, pictures and scores."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - began

    def tick(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        self.seconds = time.perf_counter() - self._began
        self.rate = max(0, step - self._first_step) * self._batch_size / max(self.seconds - self._aside, 1e-9)

    def line(self, step: int) -> dict[str, float]:
        """Mean loss and images per second since the line before."""
        training = self.seconds - self._aside
        rate = max(0, step - self._line_step) * self._batch_size / max(training - self._line_seconds, 1e-9)
        loss = sum(self._losses) / len(self._losses)
        self._line_step, self._line_seconds, self._losses = step, training, []
        return {"step": step, "loss": loss, "images_per_second": round(rate, 2), "seconds": round(self.seconds, 2)}


class _MetricsFile:
    """metrics.jsonl, one line per logged step, and the trackers beside it; written by the main process."""

    def __init__(self, folder: RunFolder, config: TrainConfig, step: int, processes: Processes):
        self._path, self._is_main = folder.metrics, processes.is_main
        self._config, self._folder = config, folder
        self.forget_after(step)

    def __enter__(self) -> _MetricsFile:
        self._trackers = []
        if self._is_main:
            watch = self._config.watch
            self._trackers = start_trackers(watch.trackers, watch.project, self._folder.path, self._config.to_dict())
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def write(self, line: dict[str, float]) -> None:
        if not self._is_main:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:                                                # a full disk: training can go on
            logger.warning("%s cannot be written: %s", self._path, error)
        for tracker in self._trackers:
            tracker.log({key: value for key, value in line.items() if key != "step"}, int(line["step"]))

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that will be done again."""
        if self._is_main and self._path.exists():
            kept = []
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError, TypeError):             # a line cut off by a kill
                    continue
            write_atomically(self._path, "".join(kept))
