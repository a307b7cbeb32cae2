"""The training loss of a flow map (lamamba/diffusion/flow_map.py), for a batch and its random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamamba.config import UNetConfig
from lamamba.diffusion.flow_map import TimeShares, draw_scale, flow_map_loss, flow_map_target, own_share, student_states
from lamamba.diffusion.schedule import NUM_TIMESTEPS, Schedule
from lamamba.options.training import FlowMapOptions
from lamamba.training.distill import VelocityTeacher


class FlowMapTask:
    """What a flow map learns.

    Args:
        options: shares of the samples, and the smallest gap.
        config: of the network.
        schedule: of the flow; it draws t.
        teacher: of the velocity; None: the data's, eps - x0.
    """

    def __init__(
        self, options: FlowMapOptions, config: UNetConfig, schedule: Schedule, teacher: VelocityTeacher | None
    ):
        self._schedule, self._teacher, self._smallest_gap = schedule, teacher, options.smallest_gap
        self._student_share = options.student_share
        self._shares = TimeShares(options.noise_share, options.velocity_share, options.image_share)
        self._guidance_range, self._lowest_share = config.guidance_range, options.lowest_share

    def losses(
        self, network: nn.Module, average: nn.Module, x0: Tensor, eps: Tensor, time: Tensor, uniform: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        """The loss of each sample: (b,).

        Args:
            network: what learns.
            average: of its weights, which the target comes from.
            x0, eps: (b, c, h, w), image and noise.
            time: (b,) uniform, the quantile of t.
            uniform: (b, 6), for the other times, the guidance scale, and whose x_t.
            labels: (b,); None for an unconditional network.
        """
        t = (self._schedule.timestep(time) / NUM_TIMESTEPS).to(x0)
        t, r = self._shares.draw(t, uniform[:, :4])
        scale = None
        if self._guidance_range is not None:
            scale = draw_scale(uniform[:, 4].to(x0), self._guidance_range, self._lowest_share)
        xt = self._schedule.add_noise(x0, eps, t * NUM_TIMESTEPS)

        def student(x: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
            return _call(average, x, t, r, _at(labels, rows), _at(scale, rows))

        def velocity(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            if self._teacher is None:
                return eps[rows] - x0[rows]
            return self._teacher.velocity(x, t, _at(labels, rows), _at(scale, rows))

        with torch.no_grad():
            if self._student_share:
                share = own_share(scale, self._guidance_range, self._student_share)
                xt = student_states(xt, eps, t, student, uniform[:, 5].to(x0) < share)
            target = flow_map_target(xt, t, r, student, velocity, self._smallest_gap)
        return flow_map_loss(_call(network, xt, t, r, labels, scale).float(), target)


def _at(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _call(network: nn.Module, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None, scale: Tensor | None) -> Tensor:
    return network(x, t * NUM_TIMESTEPS, labels, end_timestep=r * NUM_TIMESTEPS, guidance_scale=scale)
