"""Training losses of the three objectives, as functions of the network's output.

    x0 clean, eps standard normal noise, xt noisy, t timestep, each loss (b,)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamamba.diffusion.schedule import FlowSchedule, NoiseSchedule, Schedule

PIXEL_BIN = 1 / 255
"""Half a grey level of an image scaled to [-1, 1]."""
OPEN_TAIL = 0.999
"""Values beyond this belong to the outermost grey levels, whose bins are open to infinity."""


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)), elementwise."""
    difference = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) + difference - 1)


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function that the official loss uses (Page, 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of x0's grey level under a Gaussian (DDPM, Eq. 13), elementwise."""
    inverse_deviation = torch.exp(-0.5 * log_variance)
    above = _normal_cdf(inverse_deviation * (x0 - mean + PIXEL_BIN))
    below = _normal_cdf(inverse_deviation * (x0 - mean - PIXEL_BIN))
    probability = torch.where(x0 < -OPEN_TAIL, above, torch.where(x0 > OPEN_TAIL, 1 - below, above - below))
    return torch.log(probability.clamp(min=1e-12))


def noise_loss(output: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, the first c channels of the output: (b,)  (DDPM, Eq. 14)."""
    return _mean((output[:, : eps.shape[1]] - eps) ** 2)


def variational_bound(output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """One term of the variational bound per image, in bits per dimension: (b,)  (Improved DDPM, Eq. 4-7).

    KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt)) for t > 0, and -log p(x0 | x1) of a discretised Gaussian for t = 0. It
    trains the variance only: the mean's gradient is stopped.

    Args:
        output: (b, 2c, h, w), noise then variance; x0, xt: (b, c, h, w); t: (b,) int64 in 0 .. 999.
    """
    eps, variance = output.float().chunk(2, dim=1)
    log_variance = schedule.model_log_variance(variance, t)
    mean = schedule.posterior_mean(schedule.predict_x0(xt, eps.detach(), t), xt, t)
    true_mean = schedule.posterior_mean(x0, xt, t)
    true_log_variance = schedule.at(schedule.posterior_log_variance, t, xt)
    kl = _mean(_gaussian_kl(true_mean, true_log_variance, mean, log_variance))
    last_step = -_mean(_discretised_log_likelihood(x0, mean, log_variance))
    return torch.where(t == 0, last_step, kl) / math.log(2)


def min_snr_weight(t: Tensor, schedule: NoiseSchedule, gamma: float) -> Tensor:
    """Min-SNR weight: min(snr, gamma) / snr for noise, / (snr + 1) for v: (b,)  (Hang et al., 2023, Section 3.4).

    Both weigh the error of the implied x0 by min(snr, gamma).
    """
    snr = schedule.signal_to_noise(t)
    return snr.clamp(max=gamma) / (snr if schedule.objective == "noise" else snr + 1)


def hybrid_loss(
    output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, eps: Tensor, schedule: NoiseSchedule,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Noise error plus the variational bound, not rescaled: (b,)  (Improved DDPM, Eq. 16; as in DiT and the paper).

    Args:
        output: (b, 2c, h, w), noise then variance; x0, xt, eps: (b, c, h, w); t: (b,) int64 in 0 .. 999.
        weight: (b,), of the noise error only; the bound is not weighted.
    """
    return weight * noise_loss(output, eps) + variational_bound(output, x0, xt, t, schedule)


def velocity_loss(output: Tensor, x0: Tensor, t: Tensor, eps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Mean squared error of v: (b,)  (Salimans & Ho, 2022)."""
    return _mean((output - schedule.velocity(x0, eps, t)) ** 2)


def flow_loss(output: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the velocity eps - x0: (b,)  (rectified flow, Eq. 1)."""
    return _mean((output - (eps - x0)) ** 2)


def training_loss(
    output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, eps: Tensor, schedule: Schedule,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Compute the loss of the schedule's objective: (b,).

    Args:
        output: (b, out_channels, h, w); x0, xt, eps: (b, c, h, w); t: (b,).
        schedule: of the objective.
        min_snr_gamma: of the Min-SNR weight, for noise and v; None for uniform weights.
    """
    if isinstance(schedule, FlowSchedule):
        return flow_loss(output, x0, eps)
    weight = 1.0 if min_snr_gamma is None else min_snr_weight(t, schedule, min_snr_gamma)
    if schedule.objective == "v":
        return weight * velocity_loss(output, x0, t, eps, schedule)
    return hybrid_loss(output, x0, xt, t, eps, schedule, weight)
