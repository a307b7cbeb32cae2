"""Sampling: the reverse process from noise to a clean image, with diffusers' schedulers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.config import Objective, check_known
from lamamba.diffusion.flow_map_scheduler import FlowMapScheduler
from lamamba.diffusion.guidance import Predict
from lamamba.diffusion.schedule import NUM_TIMESTEPS, NoiseSchedule, per_image
from lamamba.utils.text import shown

_BETAS: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02
}


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler with the settings under which it equals the official or published sampler."""

    objectives: tuple[Objective, ...]
    make: Callable[[Objective], Any]
    default_steps: int
    what: str
    """Its kind and order, for lists of samplers."""
    min_steps: int = 1
    max_steps: int = NUM_TIMESTEPS
    is_stochastic: bool = False
    """Whether its steps draw noise, from each image's own generator."""


def _noise_levels(objective: Objective) -> dict[str, Any]:
    return {**_BETAS, "prediction_type": "epsilon" if objective == "noise" else "v_prediction"}


_FLOW: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS, "use_flow_sigmas": True, "prediction_type": "flow_prediction"
}
_NOISE_AND_V: tuple[Objective, ...] = ("noise", "v")
# with 1000 steps a multistep solver would have two equal times and divide by their difference
_MULTISTEP_MOST = NUM_TIMESTEPS - 1

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(_NOISE_AND_V, lambda objective: diffusers.DDPMScheduler(
        **_noise_levels(objective), variance_type="learned_range" if objective == "noise" else "fixed_small",
        clip_sample=False, timestep_spacing="linspace"),
        250, "ancestral, the paper's; many steps", min_steps=2, is_stochastic=True),
    "ddim": Sampler(_NOISE_AND_V, lambda objective: diffusers.DDIMScheduler(
        **_noise_levels(objective), clip_sample=False, set_alpha_to_one=True, steps_offset=0,
        timestep_spacing="leading"), 50, "first order"),
    "dpm++": Sampler(_NOISE_AND_V, lambda objective: diffusers.DPMSolverMultistepScheduler(
        **_noise_levels(objective), algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="linspace"),
        25, "DPM-Solver++ 2M, second order", max_steps=_MULTISTEP_MOST),
    "dpm++-sde": Sampler(_NOISE_AND_V, lambda objective: diffusers.DPMSolverMultistepScheduler(
        **_noise_levels(objective), algorithm_type="sde-dpmsolver++", solver_order=2, timestep_spacing="linspace"),
        50, "DPM-Solver++ 2M with fresh noise", is_stochastic=True, max_steps=_MULTISTEP_MOST),
    "unipc": Sampler(_NOISE_AND_V, lambda objective: diffusers.UniPCMultistepScheduler(
        **_noise_levels(objective), solver_order=2, timestep_spacing="linspace"),
        20, "predictor and corrector, second order", max_steps=_MULTISTEP_MOST),
    "euler": Sampler(_NOISE_AND_V, lambda objective: diffusers.EulerDiscreteScheduler(
        **_noise_levels(objective), timestep_spacing="linspace"), 50, "first order"),
    "heun": Sampler(_NOISE_AND_V, lambda objective: diffusers.HeunDiscreteScheduler(
        **_noise_levels(objective), timestep_spacing="linspace"),
        25, "second order, two evaluations per step", min_steps=5),             # with fewer it overshoots by far
    "flow-euler": Sampler(("flow",), lambda _: diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=NUM_TIMESTEPS), 28, "first order, straight steps"),
    "flow-heun": Sampler(("flow",), lambda _: diffusers.FlowMatchHeunDiscreteScheduler(
        num_train_timesteps=NUM_TIMESTEPS), 25, "second order, two evaluations per step"),
    "flow-dpm++": Sampler(("flow",), lambda _: diffusers.DPMSolverMultistepScheduler(
        **_FLOW, algorithm_type="dpmsolver++", solver_order=2), 25, "DPM-Solver++ 2M, second order"),
    "flow-unipc": Sampler(("flow",), lambda _: diffusers.UniPCMultistepScheduler(
        **_FLOW, solver_order=2), 20, "predictor and corrector, second order"),
    "flow-map": Sampler(("flow-map",), lambda _: FlowMapScheduler(
        num_train_timesteps=NUM_TIMESTEPS), 2, "steps of any length; one to four"),
}


def samplers_for(objective: Objective) -> list[str]:
    """Return the names of the samplers for an objective, the default first."""
    return [name for name, sampler in SAMPLERS.items() if objective in sampler.objectives]


def respaced_steps(num_steps: int) -> list[int]:
    """Return the official respaced timesteps, descending: num_steps of 0 .. 999, evenly spaced with both ends."""
    stride = (NUM_TIMESTEPS - 1) / (num_steps - 1)
    # summed, not multiplied: the official list is rounded from a running sum
    position, steps = 0.0, []
    for _ in range(num_steps):
        steps.append(round(position))
        position += stride
    return steps[::-1]


def make_scheduler(name: str, objective: Objective, num_steps: int | None = None) -> Any:
    """Make a diffusers scheduler with its timesteps set.

    Args:
        name: from SAMPLERS.
        objective: of the model.
        num_steps: sampling steps; by default the sampler's.

    Raises:
        ValueError: for an unknown name, one that does not fit the objective, or a number of steps out of range.
    """
    check_known("sampler", name, SAMPLERS)
    sampler = SAMPLERS[name]
    if objective not in sampler.objectives:
        raise ValueError(
            f"sampler {name!r} is for {' and '.join(sampler.objectives)} models, this one was trained for {objective}; "
            f"use {' or '.join(samplers_for(objective))}"
        )
    num_steps = sampler.default_steps if num_steps is None else num_steps
    if not sampler.min_steps <= num_steps <= sampler.max_steps:
        raise ValueError(f"sampler {name!r} takes {sampler.min_steps} to {sampler.max_steps} steps, not {num_steps}")
    scheduler = sampler.make(objective)
    set_steps(scheduler, num_steps)
    return scheduler


def set_steps(scheduler: Any, num_steps: int) -> None:
    """Set a scheduler's timesteps, on the CPU as `denoise` needs them; DDPM's as in the official sampler.

    Raises:
        ValueError: for a number of steps out of range.
    """
    config = scheduler.config
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or not 1 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"num_steps={shown(num_steps)} must be a whole number from 1 to {NUM_TIMESTEPS}")
    num_steps = int(num_steps)                                                  # NumPy's, too
    if type(scheduler).__name__.startswith("FlowMatch"):
        # N equal steps from 1 to 0; by default diffusers' last step begins at 1/1000, after N - 1 longer ones
        scheduler.sigma_min = 1 / num_steps
    try:
        if isinstance(scheduler, diffusers.DDPMScheduler) and config.timestep_spacing == "linspace" and num_steps > 1:
            scheduler.set_timesteps(timesteps=respaced_steps(num_steps))
        else:
            scheduler.set_timesteps(num_steps)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{type(scheduler).__name__} cannot take {num_steps} steps: {error}") from error
    if _setting(scheduler, "use_flow_sigmas"):
        # diffusers rounds these times down to whole numbers; the network was trained with fractions
        scheduler.timesteps = scheduler.sigmas[:-1] * NUM_TIMESTEPS


def default_steps(scheduler: Any, objective: Objective) -> int:
    """Return the default number of steps of the sampler in SAMPLERS that a scheduler equals in kind; else 50."""
    kind, algorithm = type(scheduler), _setting(scheduler, "algorithm_type")
    for name in samplers_for(objective):
        known = SAMPLERS[name].make(objective)
        if type(known) is kind and known.config.get("algorithm_type") == algorithm:
            return SAMPLERS[name].default_steps
    return 50


def _setting(scheduler: Any, name: str) -> Any:
    """A setting that the scheduler reads, or None: from_config also carries along what only another class reads."""
    return scheduler.config.get(name) if name in inspect.signature(type(scheduler)).parameters else None


def is_flow_map(scheduler: Any) -> bool:
    """Whether a scheduler takes the steps of a flow map: it says where each of them ends."""
    return hasattr(scheduler, "end_timesteps")


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler takes a rectified flow from noise to image."""
    return type(scheduler).__name__.startswith("FlowMatch") or is_flow_map(scheduler) or (
        bool(_setting(scheduler, "use_flow_sigmas")) and hasattr(scheduler, "alphas_cumprod"))


def check_scheduler(scheduler: Any, objective: Objective) -> None:
    """Check that a diffusers scheduler fits a model, whatever of another's settings came along by from_config.

    Raises:
        ValueError: when it goes from image to noise or needs more than the network's output, when its prediction type
            or noise levels differ from the model's, when it expects a variance that the model does not predict, or when
            it draws noise for the whole batch at once; with what fits.
    """
    name = type(scheduler).__name__
    fitting = f"use {' or '.join(samplers_for(objective))}, or a diffusers scheduler like theirs"
    step = inspect.signature(getattr(scheduler, "step", lambda: None)).parameters
    if list(step)[:3] != ["model_output", "timestep", "sample"] or any(
            rest.default is rest.empty for rest in list(step.values())[3:]):
        raise ValueError(f"{name} does not step from a prediction and a noisy image alone; {fitting}")
    prediction = _setting(scheduler, "prediction_type") or "another kind"
    expects = {"epsilon": "noise", "v_prediction": "v"}.get(prediction, prediction)
    if is_flow(scheduler):
        expects = "flow-map" if is_flow_map(scheduler) else "flow"
    if expects != objective:
        raise ValueError(f"{name} is for models of {expects}, this one was trained for {objective}; {fitting}")
    if scheduler.config.get("num_train_timesteps") != NUM_TIMESTEPS:
        raise ValueError(
            f"{name} has num_train_timesteps={scheduler.config.get('num_train_timesteps')}, not {NUM_TIMESTEPS}")
    if "generator" not in step and hasattr(scheduler, "noise_sampler"):
        raise ValueError(f"{name} draws its noise for the whole batch, not for each image: use dpm++-sde")
    fits = "learned_range" if objective == "noise" else "fixed_small"
    if _reads_variance(scheduler) and scheduler.variance_type != fits:
        raise ValueError(f"{name} has variance_type={scheduler.variance_type!r}, which a model of {objective} does not "
                         f"predict; make it with variance_type={fits!r}")
    if not is_flow(scheduler):
        _check_levels(scheduler)
    probe = copy.copy(scheduler)
    set_steps(probe, 10)
    first, last = float(probe.timesteps[0]), float(probe.timesteps[-1])
    left = float(probe.sigmas[-1]) if is_flow(scheduler) else 0.0               # the last of a flow's levels is 0
    if left or not first > NUM_TIMESTEPS / 2 > last:
        raise ValueError(f"{name} goes from timestep {first:g} to {last:g}{' and leaves noise' if left else ''}, not "
                         f"from noise ({NUM_TIMESTEPS}) to an image (0); {fitting}")


def _check_levels(scheduler: Any) -> None:
    levels, expected = getattr(scheduler, "alphas_cumprod", None), NoiseSchedule().alphas_cumprod.float()
    if levels is None or not torch.allclose(levels.float().cpu(), expected, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{type(scheduler).__name__} has other noise levels than the model was trained with; make it with "
            "beta_schedule=\"linear\", beta_start=1e-4, beta_end=0.02"
        )


def _reads_variance(scheduler: Any) -> bool:
    """Whether the scheduler takes a predicted variance beside the prediction, as DDPM's do."""
    return vars(scheduler).get("variance_type") in ("learned", "learned_range")


@dataclass(frozen=True)
class Step:
    """State of the sampling after one step."""

    done: int
    """Number of steps done, from 1."""
    total: int
    timestep: Tensor
    """The timestep that the step started from, a scalar."""
    x: Tensor
    """(b, c, h, w), at the noise level of the next step, in the scheduler's own scale."""
    x0: Tensor
    """(b, c, h, w), the clean image that the network predicted in this step."""


@dataclass(frozen=True)
class Known:
    """The known images and the mask of inpainting."""

    x0: Tensor
    """(b, c, h, w) or (1, c, h, w) clean."""
    repaint: Tensor
    """(b or 1, 1, h, w) in 0 .. 1: 1 where the image is sampled, 0 where it stays x0."""


def noised(scheduler: Any, x0: Tensor, noise: Tensor, index: int) -> Tensor:
    """Add noise to x0 at the level that the scheduler has before step `index`: (b, c, h, w).

    After the last step, index = len(scheduler.timesteps), it is x0 itself.
    """
    if index >= len(scheduler.timesteps):
        return x0
    t = scheduler.timesteps[index : index + 1]
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x0, t, noise)
    return scheduler.add_noise(x0, noise, t)


def first_step(scheduler: Any, strength: float) -> int:
    """Return the index of the first step of image-to-image sampling.

    Args:
        scheduler: with its timesteps set.
        strength: in (0, 1], the share of the steps that are done; 1 keeps nothing of the image.

    Raises:
        ValueError: when strength is out of range.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1]: the share of the steps, 1 keeps nothing")
    per_step = getattr(scheduler, "order", 1)                                   # Heun's timesteps come in pairs
    steps = (len(scheduler.timesteps) + per_step - 1) // per_step
    return (steps - max(1, round(strength * steps))) * per_step


def estimate_x0(scheduler: Any, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Convert the network's output to the clean image that it implies: (b, c, h, w).

        x0 = (x - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)                    noise
        x0 = sqrt(alpha_bar) x - sqrt(1 - alpha_bar) v                          v
        x0 = x - t/1000 velocity                                                flow

    Args:
        scheduler: its prediction type says what the output means.
        output: (b, c, h, w), without variance.
        x: (b, c, h, w), the network's input.
        t: a scalar in 0 .. 1000.
    """
    time = float(t)
    if is_flow(scheduler):
        return x - time / NUM_TIMESTEPS * output
    below = min(int(time), NUM_TIMESTEPS - 2)
    levels = scheduler.alphas_cumprod[below : below + 2].double()
    low, high = ((1 - levels) / levels).sqrt().tolist()
    sigma = low + (time - below) * (high - low)                                 # interpolated linearly, as in diffusers
    alpha = (1 + sigma**2) ** -0.5
    if scheduler.config.prediction_type == "v_prediction":
        return alpha * x - sigma * alpha * output
    return x / alpha - sigma * output


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical linear interpolation of noises (b, c, h, w), image by image: a at share 0, b at 1 (Shoemake, 1985).

    Unlike linear interpolation, it keeps the norm, so that normal noise stays normal.
    """
    direction_a, direction_b = (F.normalize(noise.double().flatten(1)) for noise in (a, b))
    angle = per_image((direction_a * direction_b).sum(1).clamp(-1, 1).arccos(), a)
    straight = angle.sin() < 1e-6                                               # parallel: linear instead
    weight_a, weight_b = (1 - share) * angle, share * angle
    safe = torch.where(straight, torch.ones_like(angle), angle.sin())
    arc = (weight_a.sin() * a.double() + weight_b.sin() * b.double()) / safe
    return torch.where(straight, (1 - share) * a.double() + share * b.double(), arc).to(a.dtype)


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Any,
    noise: Tensor,
    *,
    generators: Sequence[torch.Generator] | torch.Generator | None = None,
    first: int = 0,
    start: Tensor | None = None,
    known: Known | None = None,
    on_step: Callable[[Step], Tensor | None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Sample clean images: run the scheduler's reverse process from noise to x0.

    Args:
        predict: (x, t (b,)) -> output, from `guided`; t is on the CPU, like the scheduler's timesteps.
        scheduler: from `make_scheduler`, or another of diffusers' with its timesteps set.
        noise: (b, c, h, w) standard normal.
        generators: of the noise that stochastic steps draw: one per image, so that image k depends on its own alone; or
            one for the whole batch.
        first: index of the first step, 0 .. len(scheduler.timesteps); other than 0 needs start.
        start: (b, c, h, w) clean images of image-to-image sampling, noised to the level of the first step.
        known: known images and mask of inpainting; after every step the known part is replaced by its noised x0.
        on_step: called after every step; a tensor that it returns replaces x.
        interrupted: called before every step; sampling stops where it returns True.

    Returns:
        x0, (b, c, h, w).

    Raises:
        ValueError: when first is out of range, or is not 0 and start is missing.
        FloatingPointError: naming the first step whose result is not finite.
    """
    timesteps = scheduler.timesteps
    if not 0 <= first <= len(timesteps) or (first and start is None):
        raise ValueError(f"first={first} must lie in 0 .. {len(timesteps)}, and needs start= where it is not 0")
    takes_variance = _reads_variance(scheduler)
    if not takes_variance and _setting(scheduler, "variance_type"):
        scheduler = copy.copy(scheduler)                                        # it would cut the variance off itself
        scheduler.register_to_config(variance_type=None)
    extra: dict[str, Any] = {}
    if generators is not None and "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = generators if isinstance(generators, torch.Generator) else list(generators)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0)) if start is None else noised(
        scheduler, start, noise, first)
    finite = [x.isfinite().all()]                                               # read after the last step: no waits
    for i in range(first, len(timesteps)):
        if interrupted():
            break
        t = timesteps[i]
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = predict(scaled, t.expand(x.shape[0]))
        prediction = output[:, : x.shape[1]]
        x = scheduler.step(output if takes_variance else prediction, t, x, **extra).prev_sample
        finite.append(x.isfinite().all())
        if known is not None:
            x = known.repaint * x + (1 - known.repaint) * noised(scheduler, known.x0, noise, i + 1)
        if on_step:
            x0 = estimate_x0(scheduler, prediction, scaled, t)
            changed = on_step(Step(i + 1 - first, len(timesteps) - first, t, x, x0))
            x = x if changed is None else changed
    if not x.isfinite().all():
        bad = [*torch.stack(finite).tolist(), False].index(False)
        raise FloatingPointError(
            f"sampling became NaN or infinite in step {bad} of {len(timesteps) - first}: compute the network in "
            "float32 or bfloat16, take a smaller guidance scale or more steps, and look at the weights"
        )
    return x
