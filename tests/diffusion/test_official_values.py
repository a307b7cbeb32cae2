"""Schedule, loss and samplers equal the official code's."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import load_file

from lamamba.diffusion.denoise import denoise, make_scheduler, respaced_steps
from lamamba.diffusion.loss import hybrid_loss, noise_loss, variational_bound
from lamamba.diffusion.schedule import NoiseSchedule
from tests.networks import PARITY, relative_error


@pytest.fixture(scope="module")
def official():
    return load_file(PARITY / "diffusion.safetensors")


def toy(x, t):
    """The analytic denoiser of the file's chains: noise, then variance in [-1, 1]."""
    share = (t / 1000).view(-1, 1, 1, 1).float()
    return torch.cat([x * (0.2 + 0.7 * share) + 0.1 * torch.sin(3 * x), torch.cos(2 * x) * (1 - share)], dim=1)


def test_schedule(official):
    schedule = NoiseSchedule()
    torch.testing.assert_close(schedule.betas, official["schedule.betas"], rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, official["schedule.alphas_cumprod"], rtol=1e-12, atol=0)


def test_every_loss_term(official):
    schedule = NoiseSchedule()
    x0, eps, t = official["train.x0"], official["train.noise"], official["train.t"]
    assert 0 in t                                                               # the discretised likelihood
    xt = schedule.add_noise(x0, eps, t)
    output = official["train.model_output"]
    torch.testing.assert_close(xt, official["train.x_t"], rtol=1e-5, atol=1e-6)
    for name, terms in {
        "mse": noise_loss(output, eps), "vb": variational_bound(output, x0, xt, t, schedule),
        "loss": hybrid_loss(output, x0, xt, t, eps, schedule),
    }.items():
        torch.testing.assert_close(terms, official[f"train.{name}"], rtol=1e-5, atol=0, msg=name)


def test_one_reverse_step(official):
    schedule = NoiseSchedule()
    xt, t, output = official["train.x_t"], official["train.t"], official["train.model_output"]
    eps, variance = output.chunk(2, dim=1)
    x0 = schedule.predict_x0(xt, eps, t)
    assert relative_error(x0, official["reverse.pred_xstart"]) <= 1e-5
    assert relative_error(schedule.posterior_mean(x0, xt, t), official["reverse.mean"]) <= 1e-5
    log_variance = schedule.model_log_variance(variance, t)
    assert relative_error(log_variance, official["reverse.log_variance"]) <= 1e-5
    assert relative_error(log_variance.exp(), official["reverse.variance"]) <= 1e-5


@pytest.mark.parametrize("num_steps", [25, 10])
def test_ancestral_chain(official, num_steps, monkeypatch):
    scheduler = make_scheduler("ddpm", "noise", num_steps)
    assert scheduler.timesteps.flip(0).tolist() == official[f"ddpm{num_steps}.timesteps"].tolist()
    noise = iter(official[f"ddpm{num_steps}.noise"])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(noise))
    x0 = denoise(toy, scheduler, official[f"ddpm{num_steps}.x_T"])
    assert relative_error(x0, official[f"ddpm{num_steps}.x_0"]) <= 1e-4


def test_ddim_chain(official):
    scheduler = make_scheduler("ddim", "noise", 25)
    assert scheduler.timesteps.flip(0).tolist() == official["ddim25.timesteps"].tolist()
    assert relative_error(denoise(toy, scheduler, official["ddim25.x_T"]), official["ddim25.x_0"]) <= 1e-4


@pytest.mark.parametrize("num_steps", [250, 50, 4])
def test_step_lists(official, num_steps):
    assert respaced_steps(num_steps)[::-1] == official[f"respaced.{num_steps}"].tolist()
