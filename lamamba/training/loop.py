"""The training loop. It knows neither samplers nor scores: observers are told of every step and look for themselves."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lamamba.config import UNetConfig
from lamamba.data.codec import PixelCodec
from lamamba.data.images import ImageSet
from lamamba.diffusion.guidance import drop_labels
from lamamba.diffusion.loss import training_loss
from lamamba.diffusion.schedule import make_schedule
from lamamba.models.unet import LaMambaUNet
from lamamba.training.config import TrainConfig
from lamamba.training.draws import draw, image_indices
from lamamba.training.state import RunFolder, SamplingFacts, TrainState

logger = logging.getLogger("lamamba.training")


@dataclass(frozen=True)
class Moment:
    """What observers are told after every optimizer step."""

    step: int
    """Optimizer steps done."""
    steps: int
    """Steps of the whole run."""
    loss: float
    """Mean loss of the step's images."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    images_per_second: float
    """Trained on by this process since it began."""
    seconds: float
    """Since this process began to train."""
    ema: LaMambaUNet
    """The averaged network, to look at, not to change."""


Observer = Callable[[Moment], None]


def pick_device(name: str) -> torch.device:
    """ "auto" as a GPU where there is one, otherwise the CPU; any other name as it is.

    Raises:
        ValueError: for a device that PyTorch does not know or that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def describe(config: TrainConfig, images: ImageSet) -> tuple[UNetConfig, SamplingFacts]:
    """The network that a run trains on these images, and what its samplers will need to know.

    Raises:
        ValueError: when model and data do not fit.
    """
    label_names = images.label_names if config.data.use_labels else ()
    architecture = config.model.build(
        channels=images.channels, num_classes=len(label_names), input_size=images.image_size
    )
    facts = SamplingFacts(
        objective=architecture.objective, image_size=images.image_size, label_names=tuple(label_names)
    )
    return architecture, facts


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay ema + (1 - decay) model, for every parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(
    config: TrainConfig, images: ImageSet, folder: str | Path, observers: Sequence[Observer] = ()
) -> TrainState:
    """Train a network from its first step, or on from the folder's newest checkpoint, to the last.

    The same configuration gives the same run to the bit on one machine, however often it is stopped and resumed.

    Raises:
        ValueError: when configuration, data and folder do not fit together.
        FloatingPointError: when the loss or the gradient is not finite, before it touches the weights.
    """
    device = pick_device(config.device)
    architecture, facts = describe(config, images)
    run = RunFolder(folder)
    run.create(config, architecture, facts)

    torch.manual_seed(config.seed)
    model = LaMambaUNet(architecture).to(device).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )
    state = TrainState(model, ema, optimizer)
    if run.restore(state):
        logger.info("resuming %s at step %d", folder, state.step)
        _drop_metrics_after(run.metrics, state.step)

    schedule, codec = make_schedule(architecture.objective), PixelCodec()
    shape = (architecture.in_channels, *architecture.input_size)
    began, losses = time.perf_counter(), []
    first_step = logged_step = state.step
    logged_at = began
    with run.metrics.open("a", encoding="utf-8") as metrics:
        while state.step < config.steps:
            places = range(state.step * config.batch_size, (state.step + 1) * config.batch_size)
            draws = draw(config.seed, places, shape)
            chosen = image_indices(config.seed, places, len(images))
            pictures, classes = images.read(chosen)

            x0 = codec.encode(pictures, draws.mirror if config.data.mirror else None).to(device)
            t, eps = schedule.timestep(draws.time).to(device), draws.eps.to(device)
            xt = schedule.add_noise(x0, eps, t)                                 # (b, c, h, w)
            labels = None
            if architecture.num_classes:
                labels = drop_labels(
                    torch.from_numpy(classes), draws.label, config.label_dropout, architecture.num_classes
                ).to(device)
            output = model(xt, t, labels)                                       # (b, out_channels, h, w)
            loss = training_loss(output, x0, xt, t, eps, schedule).mean()

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            value, norm_value = float(loss.detach()), float(norm)
            if not (math.isfinite(value) and math.isfinite(norm_value)):
                raise FloatingPointError(_explain_non_finite(value, norm_value, state.step, chosen, model, run))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(state.step)
            optimizer.step()
            update_ema(ema, model, config.ema_decay)
            state.step += 1
            losses.append(value)

            now = time.perf_counter()
            is_last = state.step == config.steps
            if state.step % config.log_every == 0 or is_last:
                rate = (state.step - logged_step) * config.batch_size / max(now - logged_at, 1e-9)
                line = {
                    "step": state.step, "loss": sum(losses) / len(losses), "grad_norm": norm_value,
                    "learning_rate": optimizer.param_groups[0]["lr"], "images_per_second": round(rate, 2),
                    "seconds": round(now - began, 2),
                }
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                losses, logged_at, logged_step = [], now, state.step
            if state.step % config.checkpoint_every == 0 or is_last:
                run.save(state, facts, config.keep_checkpoints)
            rate = (state.step - first_step) * config.batch_size / max(now - began, 1e-9)
            moment = Moment(state.step, config.steps, value, norm_value, rate, now - began, ema)
            for observer in observers:
                observer(moment)
    return state


def _drop_metrics_after(path: Path, step: int) -> None:
    """Forget lines of steps that a restart will do again."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):                 # a line cut off by a kill
                continue
        path.write_text("".join(kept), encoding="utf-8")


def _explain_non_finite(
    loss: float, norm: float, step: int, chosen: list[int], model: nn.Module, run: RunFolder
) -> str:
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    where = f"; first gradient that is not finite: {bad[0]}" if bad else ""
    newest = run.names()[-1] if run.names() else "none yet"
    return (
        f"step {step + 1}: loss {loss}, gradient norm {norm}{where}; the weights were not touched. Images "
        f"{chosen[:8]}{'...' if len(chosen) > 8 else ''}. Last checkpoint: {newest}. A lower "
        "--optimizer.learning-rate or --optimizer.max-grad-norm 1 often helps"
    )
