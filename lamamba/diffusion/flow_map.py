"""Flow maps: the mean velocity of a flow between two times, learned by progressive self-distillation.

    dx/dt = v(x, t)                                             the flow, t = 1 noise .. 0 image
    u(x_t, t, r) = 1/(t - r) int_r^t v(x_s, s) ds               mean velocity along its path from t to r <= t
    x_r = x_t - (t - r) u(x_t, t, r)                            one step of any length; u(x, t, t) = v(x, t)

A step is two half steps, which is all that must be learned beyond v (Boffi et al., 2025, "How to build a consistency
model: learning flow maps via self-distillation", progressive self-distillation; shortcut models, Frans et al., 2024):

    s = (t + r)/2,  u1 = u'(x_t, t, s),  x_s = x_t - (t - s) u1,  u2 = u'(x_s, s, r)
    target = (u1 + u2)/2                for r < t, u' the averaged student without gradient
    target = v(x_t, t)                  for r = t: a teacher's, guided if there is guidance, or eps - x0

No derivative of the network is needed, unlike MeanFlow's (Geng et al., 2025).

    x_t (b, c, h, w); t, r, scale (b,); times are 0 .. 1 here, and timesteps 0 .. 1000 in the network
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lamamba.diffusion.schedule import NUM_TIMESTEPS, NoiseSchedule, per_image

MeanVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, t, r, rows) -> u(x, t, r), for the images with these indices of the batch."""
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, rows) -> v(x, t), for the images with these indices of the batch."""

LOSS_FLOOR = 1e-3
"""Squared error below which the loss no longer grows like the error itself."""


@dataclass(frozen=True)
class TimeShares:
    """How many training samples have times at the ends of their ranges."""

    noise: float = 0.25
    """Of the samples: t = 1, where every image begins."""
    velocity: float = 0.25
    """Of the samples: r = t."""
    image: float = 0.3
    """Of the samples with r < t: r = 0; the others' r is uniform in (0, t)."""

    def draw(self, t: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """t and r of training samples: (b,) float32 each.

        Args:
            t: (b,), as the schedule draws it.
            uniform: (b, 4): whether t = 1, whether r = t, whether r = 0, and r's share of t.
        """
        at_noise, at_t, at_image, share = uniform.to(t).unbind(1)
        t = torch.where(at_noise < self.noise, torch.ones_like(t), t)
        r = torch.where(at_image < self.image, torch.zeros_like(t), share * t)
        return t, torch.where(at_t < self.velocity, t, r)


def draw_scale(uniform: Tensor, guidance_range: tuple[float, float], lowest_share: float = 0.0) -> Tensor:
    """Guidance scales of training samples: (b,). Low scales are what most images are drawn at.

    low for a share of them, and low + (high - low) v^2 for the others, v uniform. Both are our choice: where the range
    is 1 .. 4, half of the others lie below 1.75.
    """
    low, high = guidance_range
    v = ((uniform - lowest_share) / (1 - lowest_share)).clamp(min=0)
    return low + (high - low) * v**2


def own_share(
    scale: Tensor | None, guidance_range: tuple[float, float] | None, highest_share: float
) -> Tensor | float:
    """How likely x_t of a sample is on the student's own path: (b,), or one number without guidance.

    highest_share (w - low)/(high - low): the higher a path's scale w, the further it leaves the noised images'
    distribution; at the lowest it does not.
    """
    if scale is None or guidance_range is None:
        return highest_share
    low, high = guidance_range
    return highest_share * (scale - low) / (high - low)


def step_to(x: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r = x_t - (t - r) u: (b, c, h, w)."""
    return x - per_image(t - r, x).to(x) * u


def student_states(x: Tensor, eps: Tensor, t: Tensor, student: MeanVelocity, chosen: Tensor) -> Tensor:
    """Where the student's own path from noise is at t, in place of noised images: (b, c, h, w).

    x_t = eps - (1 - t) u'(eps, 1, t). A guided path leaves the noised images' distribution, so that a student of these
    alone never sees what it samples from (backward distillation: Kohler et al., 2024, "Imagine Flash").

    Args:
        x: noised images, where nothing else is chosen.
        eps, t: the noise (b, c, h, w) and the times (b,).
        student: the averaged one; called once, whatever is chosen.
        chosen: (b,) bool.
    """
    rows, x = _rows(chosen), x.clone()
    ones = torch.ones_like(t[rows])
    u = student(eps[rows], ones, t[rows], rows)
    _put(x, rows, chosen, step_to(eps[rows], u, ones, t[rows]))
    return x


def flow_map_target(
    x: Tensor, t: Tensor, r: Tensor, student: MeanVelocity, velocity: Velocity, smallest_gap: float = 0.0
) -> Tensor:
    """The target of u(x_t, t, r): (b, c, h, w), float32.

    Args:
        x, t, r: of the batch.
        student: the averaged one.
        velocity: v, of a teacher or of the batch's own noise and image.
        smallest_gap: half steps shorter than this begin with v in place of the student's.

    The student is called twice and the velocity once, whatever the times: ranks that wait for one another do the same.
    """
    half = (t - r) / 2
    s, is_map = t - half, half > 0
    by_student = is_map & (half >= smallest_gap)
    u1 = torch.zeros_like(x, dtype=torch.float32)
    rows = _rows(by_student)
    _put(u1, rows, by_student, student(x[rows], t[rows], s[rows], rows))
    rows = _rows(~by_student)
    _put(u1, rows, ~by_student, velocity(x[rows], t[rows], rows))
    rows, target = _rows(is_map), u1.clone()                                    # where r = t, u1 is v
    x_s = step_to(x[rows], u1[rows].to(x), t[rows], s[rows])
    u2 = student(x_s, s[rows], r[rows], rows).float()
    _put(target, rows, is_map, (u1[rows] + u2) / 2)
    return target


def _put(target: Tensor, rows: Tensor, chosen: Tensor, values: Tensor) -> None:
    """Replace the chosen images among rows, (b, c, h, w); the first one may be there without being chosen."""
    target[rows] = torch.where(per_image(chosen[rows], target), values.to(target), target[rows])


def _rows(chosen: Tensor) -> Tensor:
    """Indices of the chosen images; the first one's where there is none, so that a batch is never empty."""
    rows = chosen.nonzero()[:, 0]
    return rows if len(rows) else rows.new_zeros(1)


def flow_map_loss(output: Tensor, target: Tensor) -> Tensor:
    """e / sqrt(e' + 1e-3), e the mean squared error and e' the same without gradient: (b,).

    The adaptive weight of MeanFlow (Geng et al., 2025, Section 4.3) with p = 1/2: an image's gradient has a length that
    hardly depends on the size of its error.
    """
    error = (output - target).square().flatten(1).mean(1)
    return error / (error.detach() + LOSS_FLOOR).sqrt()


class FlowFromNoise:
    """A network of noise or v as the velocity of the straight path (rectified flow).

    Both paths have the same images at the same ratio of noise to image, up to a factor:

        x_t = (1 - t) x0 + t eps = a y,  y = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
        alpha_bar = (1 - t)^2 / a^2,  a = sqrt((1 - t)^2 + t^2)
        v(x_t, t) = eps - x0, with the noise and the image that the network finds in y

    Beyond the schedule's noisiest and cleanest levels (t > 0.994 and t < 0.0099) the nearest of them is taken.

    Args:
        schedule: of the network.
    """

    def __init__(self, schedule: NoiseSchedule):
        self._objective = schedule.objective
        self._log_ratio = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).log() / 2       # of noise to image

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """y (b, c, h, w) and the timestep (b,) of the noise schedule, between its whole numbers by the log-ratio."""
        log_ratio = torch.logit(t.double().cpu(), eps=1e-9).clamp(self._log_ratio[0], self._log_ratio[-1])
        above = torch.searchsorted(self._log_ratio, log_ratio).clamp(1, NUM_TIMESTEPS - 1)
        low, high = self._log_ratio[above - 1], self._log_ratio[above]
        timestep = above - 1 + (log_ratio - low) / (high - low)
        return x / per_image((1 - t).square() + t.square(), x).sqrt().to(x), timestep.to(x.device, torch.float32)

    def velocity(self, output: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """v = eps - x0: (b, c, h, w).

        Args:
            output: of the network for `inputs`; channels after y's, the variance, are left out.
            y: from `inputs`.
            t: of the straight path.
        """
        output = output[:, : y.shape[1]].float()
        log_ratio = torch.logit(t.double().cpu(), eps=1e-9).clamp(self._log_ratio[0], self._log_ratio[-1])
        image, noise = (per_image(torch.sigmoid(sign * 2 * log_ratio).sqrt(), y).to(y) for sign in (-1, 1))
        if self._objective == "v":
            eps, x0 = image * output + noise * y, image * y - noise * output
        else:
            eps, x0 = output, (y - noise * output) / image
        return eps - x0
