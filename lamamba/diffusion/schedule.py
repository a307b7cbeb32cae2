"""Forward processes: noise schedules and the distribution of training timesteps.

    x0 clean, eps standard normal noise, xt noisy, t in 0 .. 1000 (clean .. noise)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lamamba.config import Objective

NUM_TIMESTEPS = 1000


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """Values of images (b,), broadcastable with x (b, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))


def logit_normal(uniform: Tensor, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    """Logit-normal samples in (0, 1) from uniform ones: (b,) float64  (Stable Diffusion 3, Eq. 19)."""
    # clamped: the normal quantiles of 0 and 1 are infinite
    normal = torch.special.ndtri(uniform.double().clamp(1e-9, 1 - 1e-9))
    return torch.sigmoid(mean + deviation * normal)


class NoiseSchedule:
    """DDPM's 1000 steps with linear betas 1e-4 .. 0.02 (Ho et al., 2020; Improved DDPM's learned variance range).

    Args:
        objective: "noise" or "v"; the noise levels are the same.
        times: None for uniform timesteps, or (mean, deviation) of logit-normal ones.
    """

    def __init__(self, objective: Objective = "noise", times: tuple[float, float] | None = None) -> None:
        self.objective, self.times = objective, times
        betas = np.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=np.float64)
        alphas = 1 - betas
        alphas_cumprod = np.cumprod(alphas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        as_tensor = torch.from_numpy
        self.betas = as_tensor(betas)
        self.alphas_cumprod = as_tensor(alphas_cumprod)
        self.log_betas = as_tensor(np.log(betas))
        # the posterior of the first step has variance 0: replaced by the second one's, as in the official code
        self.posterior_log_variance = as_tensor(np.log(np.append(posterior_variance[1], posterior_variance[1:])))
        self.posterior_x0_weight = as_tensor(betas * np.sqrt(previous) / (1 - alphas_cumprod))
        self.posterior_xt_weight = as_tensor((1 - previous) * np.sqrt(alphas) / (1 - alphas_cumprod))

    def at(self, values: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Gather a table's entries at t (b,), broadcastable with x: (b, 1, 1, 1)."""
        return per_image(values[t.cpu()].to(x), x)

    def timestep(self, uniform: Tensor) -> Tensor:
        """Draw timesteps 0 .. 999 from uniform numbers in [0, 1): (b,) int64."""
        if self.times is not None:
            uniform = logit_normal(uniform, *self.times)
        return (uniform * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Sample q(xt | x0): xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps  (DDPM, Eq. 4)."""
        alpha_bar = self.alphas_cumprod
        return self.at(alpha_bar.sqrt(), t, x0) * x0 + self.at((1 - alpha_bar).sqrt(), t, x0) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Velocity v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0  (Salimans & Ho, 2022, Section 4)."""
        alpha_bar = self.alphas_cumprod
        return self.at(alpha_bar.sqrt(), t, x0) * eps - self.at((1 - alpha_bar).sqrt(), t, x0) * x0

    def signal_to_noise(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t): (b,) float32 on t's device."""
        alpha_bar = self.alphas_cumprod[t.cpu()]
        return (alpha_bar / (1 - alpha_bar)).float().to(t.device)

    def predict_x0(self, xt: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Clean image that a noise prediction implies, the inverse of `add_noise`: (b, c, h, w)."""
        alpha_bar = self.alphas_cumprod
        return self.at((1 / alpha_bar).sqrt(), t, xt) * xt - self.at((1 / alpha_bar - 1).sqrt(), t, xt) * eps

    def posterior_mean(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | xt, x0)  (DDPM, Eq. 7)."""
        return self.at(self.posterior_x0_weight, t, xt) * x0 + self.at(self.posterior_xt_weight, t, xt) * xt

    def model_log_variance(self, variance: Tensor, t: Tensor) -> Tensor:
        """Log-variance of the learned range: -1 is the posterior's, 1 is beta's  (Improved DDPM, Eq. 15)."""
        share = (variance + 1) / 2
        return share * self.at(self.log_betas, t, variance) + (1 - share) * self.at(
            self.posterior_log_variance, t, variance
        )


class FlowSchedule:
    """Rectified flow (Liu et al., 2022): the straight path from image to noise; t / 1000 is the share of noise.

    Args:
        times: (mean, deviation) of logit-normal times, or None for uniform ones.
    """

    objective: Objective = "flow"

    def __init__(self, times: tuple[float, float] | None = (0.0, 1.0)) -> None:
        self.times = times

    def timestep(self, uniform: Tensor) -> Tensor:
        """Draw times in 0 .. 1000 from uniform numbers in (0, 1): (b,) float32."""
        if self.times is not None:
            uniform = logit_normal(uniform, *self.times)
        return (uniform * NUM_TIMESTEPS).float()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """xt = (1 - t/1000) x0 + t/1000 eps."""
        share = per_image((t / NUM_TIMESTEPS).to(x0), x0)
        return (1 - share) * x0 + share * eps


Schedule = NoiseSchedule | FlowSchedule


def make_schedule(
    objective: Objective, timesteps: str | None = None, logit_mean: float = 0.0, logit_deviation: float = 1.0
) -> Schedule:
    """Make the training schedule of an objective.

    Args:
        objective: of the network.
        timesteps: distribution, "uniform" or "logit-normal"; by default uniform for noise and v, else logit-normal.
        logit_mean, logit_deviation: of the logit-normal distribution.
    """
    is_flow = objective in ("flow", "flow-map")
    if timesteps is None:
        timesteps = "logit-normal" if is_flow else "uniform"
    times = (logit_mean, logit_deviation) if timesteps == "logit-normal" else None
    return FlowSchedule(times) if is_flow else NoiseSchedule(objective, times)
