"""The one sampling loop: from noise to a clean image, by any of diffusers' schedulers that fits the objective."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from lamamba.config import Objective, unknown_name
from lamamba.diffusion.guidance import Predict
from lamamba.diffusion.schedule import NUM_TIMESTEPS

_BETAS: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02
}


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler under its short name, with the settings that agree with the official samplers."""

    objectives: tuple[Objective, ...]
    make: Callable[[Objective], Any]
    default_steps: int
    min_steps: int = 1


def _noise_levels(objective: Objective) -> dict[str, Any]:
    return {**_BETAS, "prediction_type": "epsilon" if objective == "noise" else "v_prediction"}


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(("noise", "v"), lambda objective: DDPMScheduler(
        **_noise_levels(objective), variance_type="learned_range" if objective == "noise" else "fixed_small",
        clip_sample=False, timestep_spacing="linspace"), 250, min_steps=2),
    "ddim": Sampler(("noise", "v"), lambda objective: DDIMScheduler(
        **_noise_levels(objective), clip_sample=False, set_alpha_to_one=True, steps_offset=0,
        timestep_spacing="leading"), 50),
    "dpm++": Sampler(("noise", "v"), lambda objective: DPMSolverMultistepScheduler(
        **_noise_levels(objective), algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="linspace"), 25),
    "flow-euler": Sampler(
        ("flow",), lambda _: FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS), 50),
    "flow-heun": Sampler(("flow",), lambda _: FlowMatchHeunDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS), 25),
}


def samplers_for(objective: Objective) -> list[str]:
    """Names of the samplers that fit an objective, the default first."""
    return [name for name, sampler in SAMPLERS.items() if objective in sampler.objectives]


def respaced_steps(num_steps: int) -> list[int]:
    """The official sampler's timesteps, last to first: num_steps of 0 .. 999, evenly spaced with both ends."""
    stride = (NUM_TIMESTEPS - 1) / (num_steps - 1)
    # summed, not multiplied: the official list is rounded from a running sum
    place, steps = 0.0, []
    for _ in range(num_steps):
        steps.append(round(place))
        place += stride
    return steps[::-1]


def make_scheduler(name: str, objective: Objective, num_steps: int | None = None) -> Any:
    """A diffusers scheduler with its timesteps set, ready for `denoise`.

    Raises:
        ValueError: for an unknown name, one that does not fit the objective, or a number of steps it cannot take.
    """
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    sampler = SAMPLERS[name]
    if objective not in sampler.objectives:
        raise ValueError(
            f"sampler {name!r} is for {' and '.join(sampler.objectives)} models, this one was trained for {objective}; "
            f"use {' or '.join(samplers_for(objective))}"
        )
    num_steps = sampler.default_steps if num_steps is None else num_steps
    if not sampler.min_steps <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(
            f"sampler {name!r} takes {sampler.min_steps} to {NUM_TIMESTEPS} steps, not {num_steps}"
        )
    scheduler = sampler.make(objective)
    if name == "ddpm":
        scheduler.set_timesteps(timesteps=respaced_steps(num_steps))
    else:
        scheduler.set_timesteps(num_steps)
    return scheduler


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Any,
    noise: Tensor,
    *,
    generators: Sequence[torch.Generator] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Walk the scheduler's timesteps from pure noise to a clean image.

    Args:
        predict: (x, t (b,)) -> output, from `guided`; t lies where the scheduler has its timesteps: on the CPU.
        scheduler: from `make_scheduler`.
        noise: (b, c, h, w) standard normal.
        generators: one per image, for schedulers that draw noise on the way; so image k depends on its own alone.
        on_step: told (steps done, steps in all) after every step.

    Returns:
        x0, (b, c, h, w).
    """
    takes_variance = scheduler.config.get("variance_type") == "learned_range"
    extra = {}
    if generators is not None and "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = list(generators)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    timesteps = scheduler.timesteps
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = predict(scaled, t.expand(x.shape[0]))
        if not takes_variance:
            output = output[:, : x.shape[1]]
        x = scheduler.step(output, t, x, **extra).prev_sample
        if on_step:
            on_step(i + 1, len(timesteps))
    return x
