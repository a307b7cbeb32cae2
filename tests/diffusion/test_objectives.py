"""v prediction, Min-SNR weights and distributions of timesteps, each by the identity that defines it."""

from __future__ import annotations

import pytest
import torch

from lamamba.diffusion.loss import min_snr_weight, noise_loss, training_loss, velocity_loss
from lamamba.diffusion.schedule import FlowSchedule, NoiseSchedule, make_schedule

T = torch.tensor([0, 10, 300, 700, 999])


def sample():
    generator = torch.Generator().manual_seed(0)
    x0, eps, output = (torch.randn(5, 2, 4, 4, generator=generator) for _ in range(3))
    return x0, eps, output


def test_v_and_noisy_image_give_the_clean_image():
    """x0 = sqrt(alpha_bar) xt - sqrt(1 - alpha_bar) v (Salimans & Ho, 2022, Section 4)."""
    schedule = NoiseSchedule("v")
    x0, eps, _ = sample()
    xt, v = schedule.add_noise(x0, eps, T), schedule.velocity(x0, eps, T)
    alpha_bar = schedule.alphas_cumprod[T].view(-1, 1, 1, 1).float()
    torch.testing.assert_close(alpha_bar.sqrt() * xt - (1 - alpha_bar).sqrt() * v, x0, rtol=1e-5, atol=1e-5)
    assert velocity_loss(v, x0, T, eps, schedule).abs().max() == 0


@pytest.mark.parametrize("objective", ["noise", "v"])
def test_min_snr_weighs_the_error_of_the_implied_x0_by_the_smaller_of_snr_and_gamma(objective):
    """For either objective the weighted loss is min(snr, gamma) |x0 - x0'|^2 (Hang et al., 2023, Eq. 5)."""
    schedule = NoiseSchedule(objective)
    x0, eps, output = sample()
    xt = schedule.add_noise(x0, eps, T)
    alpha_bar = schedule.alphas_cumprod[T].view(-1, 1, 1, 1).float()
    if objective == "noise":
        implied = schedule.predict_x0(xt, output, T)
        error = noise_loss(torch.cat([output, output], 1), eps)
    else:
        implied = alpha_bar.sqrt() * xt - (1 - alpha_bar).sqrt() * output
        error = velocity_loss(output, x0, T, eps, schedule)
    snr = schedule.signal_to_noise(T)
    expected = snr.clamp(max=5.0) * ((implied - x0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(min_snr_weight(T, schedule, 5.0) * error, expected, rtol=2e-3, atol=1e-6)


def test_the_training_loss_takes_the_weight():
    schedule = NoiseSchedule("v")
    x0, eps, output = sample()
    xt = schedule.add_noise(x0, eps, T)
    plain, weighted = (training_loss(output, x0, xt, T, eps, schedule, gamma) for gamma in (None, 5.0))
    torch.testing.assert_close(weighted, plain * min_snr_weight(T, schedule, 5.0))
    assert weighted[0] < 0.01 * plain[0]                                        # low noise: low weight
    assert weighted[-1] == pytest.approx(float(plain[-1] * schedule.signal_to_noise(T)[-1]), rel=1e-3)


def test_timesteps_are_drawn_from_the_requested_distribution():
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for objective in ("noise", "v"):
        assert isinstance(make_schedule(objective), NoiseSchedule)
        steps = make_schedule(objective, "logit-normal", -0.5, 0.8).timestep(uniform)
        assert steps.dtype == torch.int64
        logits = torch.logit((steps.double() + 0.5) / 1000)
        assert float(logits.mean()) == pytest.approx(-0.5, abs=0.02)
        assert float(logits.std()) == pytest.approx(0.8, abs=0.02)
    torch.testing.assert_close(FlowSchedule(None).timestep(uniform), (uniform * 1000).float())
    assert torch.equal(make_schedule("flow").timestep(uniform), make_schedule("flow", "logit-normal").timestep(uniform))
    assert torch.equal(make_schedule("flow", "uniform").timestep(uniform), FlowSchedule(None).timestep(uniform))
