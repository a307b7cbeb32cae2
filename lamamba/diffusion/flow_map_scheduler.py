"""FlowMapScheduler: sampling with a flow map, in as few steps as one, as a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from lamamba.diffusion.schedule import NUM_TIMESTEPS, per_image


@dataclass
class FlowMapSchedulerOutput(BaseOutput):
    """What a step returns."""

    prev_sample: Tensor
    """(b, c, h, w), at the time where the step ends."""


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    """Steps of a flow map from noise (t = 1) to an image (t = 0), each from one time to the next.

        x_r = x_t - (t - r) u(x_t, t, r)

    The network must know where a step ends, besides where it begins: `end_timesteps`, for each of `timesteps`.

        scheduler.set_timesteps(2)                          # timesteps 1000, 500; end_timesteps 500, 0
        for t, r in zip(scheduler.timesteps, scheduler.end_timesteps):
            u = unet(x, t, labels, end_timestep=r)
            x = scheduler.step(u, t, x).prev_sample

    Args:
        num_train_timesteps: what the network calls pure noise.
    """

    order = 1
    init_noise_sigma = 1.0
    _step_index: int | None
    _begin_index: int | None

    @register_to_config
    def __init__(self, num_train_timesteps: int = NUM_TIMESTEPS):
        self.set_timesteps(1)

    @property
    def step_index(self) -> int | None:
        """Of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Of the first step, where `set_begin_index` has given it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with a later step, for image-to-image sampling."""
        self._begin_index = begin_index

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the times of a run.

        Args:
            num_inference_steps: so many equal steps.
            device: of the times.
            timesteps: instead, the times where steps begin, falling from num_train_timesteps; the last step ends at 0.

        Raises:
            ValueError: for fewer than one step, both or none of the two, or times that do not fall.
        """
        most = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give num_inference_steps or timesteps, one of the two")
        if num_inference_steps is not None:
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
            levels = torch.linspace(most, 0, num_inference_steps + 1, dtype=torch.float32)
        else:
            assert timesteps is not None
            levels = torch.tensor([*timesteps, 0.0], dtype=torch.float32)
            if len(levels) < 2 or levels[0] > most or not bool((levels.diff() < 0).all()):
                raise ValueError(f"timesteps={list(timesteps)} must fall from at most {most} to above 0")
        self.num_inference_steps = len(levels) - 1
        self.sigmas = (levels / most).cpu()                                     # shares of noise; the last is 0
        self.timesteps, self.end_timesteps = levels[:-1].to(device), levels[1:].to(device)
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input, which is the sample itself."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Number of the step that begins at a time.

        Raises:
            ValueError: when none does.
        """
        found = (self.timesteps.cpu() == float(timestep)).nonzero()
        if not len(found):
            raise ValueError(f"no step begins at timestep {float(timestep):g}; they begin at {self.timesteps.tolist()}")
        return int(found[0])

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> FlowMapSchedulerOutput | tuple[Tensor]:
        """Go from one time to the next.

        Args:
            model_output: (b, c, h, w), u(x_t, t, r) with r of `end_timesteps`.
            timestep: t, one of `timesteps`.
            sample: (b, c, h, w), x_t.
            return_dict: False gives the tuple (x_r,).
        """
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        t, r = self.sigmas[self._step_index : self._step_index + 2].tolist()
        x = (sample.float() - (t - r) * model_output.float()).to(sample.dtype)
        self._step_index += 1
        return FlowMapSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = (1 - t) x0 + t eps: (b, c, h, w).

        Args:
            sample: (b, c, h, w), x0.
            timestep: (b,) or (1,), t in 0 .. num_train_timesteps.
            noise: (b, c, h, w), eps; by default fresh.
        """
        noise = torch.randn_like(sample) if noise is None else noise
        t = per_image(timestep.to(sample) / self.config.num_train_timesteps, sample)
        return (1 - t) * sample + t * noise

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise` under the name and in the order of diffusers' other schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
