"""Every scheduler of diffusers, made from our samplers' configurations: it arrives at the data, or is refused by name.

Data of one image: the exact prediction is known, and whatever samples rightly ends at that image.
"""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from lamamba.diffusion.denoise import check_scheduler, denoise, make_scheduler, samplers_for, set_steps
from lamamba.diffusion.schedule import NoiseSchedule

CLASSES = [getattr(diffusers, name) for name in sorted(dir(diffusers)) if name.endswith("Scheduler")]
KINDS = [kind for kind in CLASSES if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)]
OBJECTIVES = ("noise", "v", "flow")
OF_NOISE_LEVELS = {
    "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM",
    "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
}
OF_FLOWS = {"FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"}
FITTING = {"noise": OF_NOISE_LEVELS, "v": OF_NOISE_LEVELS, "flow": OF_FLOWS}
"""What must run; others may."""


def exact(objective, image):
    """The network of data that is one image."""
    levels = NoiseSchedule().alphas_cumprod.double()
    sigmas = ((1 - levels) / levels).sqrt()

    def predict(x, t):
        time = float(t[0])
        if objective == "flow":
            return ((x.double() - image) / max(time / 1000, 1e-3)).float()
        below = min(int(time), 998)
        sigma = torch.lerp(sigmas[below], sigmas[below + 1], time - below)
        alpha = (1 + sigma**2) ** -0.5
        eps = (x.double() - alpha * image) / (alpha * sigma)
        if objective == "noise":
            return torch.cat([eps, torch.zeros_like(eps)], 1).float()
        return (alpha * eps - alpha * sigma * image).float()

    return predict


def distance(scheduler, objective, channels):
    image = torch.linspace(-0.8, 0.8, channels, dtype=torch.float64).view(1, -1, 1, 1).expand(2, -1, 2, 2)
    set_steps(scheduler, 10)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    return float((denoise(exact(objective, image), scheduler, noise, generators=generators) - image).abs().max())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_it_samples_or_is_refused_by_name(kind, objective):
    ran = False
    for sampler in samplers_for(objective)[:3:2]:                               # not all: some take a second to make
        wrong = None
        try:
            scheduler = kind.from_config(make_scheduler(sampler, objective).config)
            check_scheduler(scheduler, objective)
        except (NotImplementedError, TypeError, ValueError) as error:           # all but the last: diffusers' own
            wrong = error
        assert wrong is None or kind.__name__ in str(wrong)
        for channels in (1, 4) if wrong is None else ():
            ran = True
            assert distance(scheduler, objective, channels) < 0.2               # PNDM's; others are below 0.04
    if kind.__name__.removesuffix("Scheduler") in FITTING[objective]:
        assert ran
    if "Inverse" in kind.__name__:
        assert not ran


@pytest.mark.parametrize(("kind", "objective", "settings", "said"), [
    ("DDPM", "noise", dict(variance_type="learned"), "variance_type='learned'.*'learned_range'"),
    ("DDPMParallel", "v", dict(variance_type="learned_range"), "variance_type='learned_range'.*'fixed_small'"),
    ("FlowMatchEulerDiscrete", "flow", dict(invert_sigmas=True), "goes from timestep 0 to 900"),
    ("FlowMatchEulerDiscrete", "flow", dict(use_dynamic_shifting=True), "cannot take 10 steps.*mu"),
    ("EulerDiscrete", "v", dict(timestep_type="continuous"), "not from noise"),
    ("EulerDiscrete", "flow", dict(use_flow_sigmas=True, prediction_type="epsilon"), "is for models of noise"),
    ("DDIM", "noise", dict(rescale_betas_zero_snr=True), "other noise levels"),
    ("RePaint", "noise", {}, "does not step from"),
    ("ScoreSdeVe", "noise", {}, "does not step from"),
])
def test_settings_that_do_not_fit(kind, objective, settings, said):
    config = make_scheduler(samplers_for(objective)[0], objective).config
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(config, **settings)
    with pytest.raises(ValueError, match=f"{kind}Scheduler.*{said}"):
        check_scheduler(scheduler, objective)


def test_a_scheduler_keeps_its_configuration():
    """Also that which goes on to the next scheduler by from_config."""
    ddpm = make_scheduler("ddpm", "noise")
    solver = diffusers.DPMSolverMultistepScheduler.from_config(ddpm.config)
    assert distance(solver, "noise", 4) < 1e-4
    assert solver.config.variance_type == "learned_range"
    assert diffusers.DDPMScheduler.from_config(solver.config).variance_type == "learned_range"
