"""Calibration sets: the inputs on which a network is compared with what is left of it.

    xt = schedule.add_noise(x0, eps, t)         of images or latents, at times drawn evenly from a range
    xt = a state of the network's own sampling  where there is no data
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from lamamba.config import UNetConfig
from lamamba.data.sets import TrainingSet
from lamamba.diffusion.denoise import denoise, make_scheduler, samplers_for
from lamamba.diffusion.guidance import Guidance, drop_labels
from lamamba.diffusion.loss import training_loss
from lamamba.diffusion.schedule import NUM_TIMESTEPS, Schedule, make_schedule
from lamamba.models.unet import LaMambaUNet
from lamamba.sampling.generate import GuidedModel, noise_of
from lamamba.training.draws import draw, image_indices

BATCH_SIZE = 64
"""Samples at a time."""
LABEL_DROPOUT = 0.1
"""Share of samples without their label, as in training: guidance asks the network for both."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a forward pass."""

    inputs: dict[str, Any]
    """Arguments of the network's forward: tensors of b rows, also in dicts."""
    times: Tensor
    """(b,) 0 .. 1000."""
    loss: Callable[[Tensor], Tensor] | None = None
    """The training loss of an output, (b,); None for states of sampling, which have no clean image."""


@dataclass(frozen=True)
class Calibration:
    """Batches to compare networks on, and what they are."""

    batches: Sequence[Batch]
    channels: int
    """Channels of the output that count: the prediction without a learned variance."""
    about: dict[str, Any] = field(default_factory=dict)
    """Data, number of samples, seed and range of times, for the files made from it."""

    @property
    def times(self) -> Tensor:
        """(n,) of all samples."""
        return torch.cat([batch.times for batch in self.batches])

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        """The network's output in evaluation mode, (b, out_channels, h, w) float32."""
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        try:
            with torch.no_grad():
                output = model(**send_to_device(batch.inputs, device))
        finally:
            model.train(was_training)
        output = getattr(output, "sample", output).float()
        if not output.isfinite().all():
            raise FloatingPointError(
                "the network's output is not finite on the calibration set: weights or data are damaged"
            )
        return output

    def predictions(self, model: nn.Module) -> list[Tensor]:
        """The network's prediction for each batch, (b, channels, h, w) float32.

        Raises:
            FloatingPointError: when it is not finite.
        """
        return [self._output(model, batch)[:, : self.channels] for batch in self.batches]

    def losses(self, model: nn.Module) -> list[Tensor]:
        """The training loss of each sample of all batches, (b,) each.

        Raises:
            ValueError: for states of sampling, which have no clean image to compare with.
            FloatingPointError: as `predictions`.
        """
        if any(batch.loss is None for batch in self.batches):
            raise ValueError("criterion 'task' needs data: states of sampling have no clean image to compare with")
        return [batch.loss(self._output(model, batch)) for batch in self.batches if batch.loss is not None]


def from_data(
    model: LaMambaUNet, data: TrainingSet, *, samples: int = 512, first: int = 0, seed: int = 0,
    times: tuple[float, float] = (0, NUM_TIMESTEPS), batch_size: int = BATCH_SIZE,
) -> Calibration:
    """Data with noise, at times drawn evenly from a range; a tenth of the samples without their label.

    Args:
        model: the network; it says channels, size, classes and objective.
        data: what it was trained on; its images may repeat where there are fewer than samples.
        samples: how many.
        first: position of the first in the seed's order of images, which repeats none before all have come.
        seed: of order, noise, times and dropped labels.
        times: lowest and highest timestep, 0 (clean) .. 1000 (noise).

    Raises:
        ValueError: when the data is not of the network's size, channels or classes.
    """
    config = model.architecture
    needs, has = (config.in_channels, *config.input_size), (data.channels, data.input_size, data.input_size)
    if needs != has:
        raise ValueError(f"{data.name} has samples of {has}, the network takes {needs}: give the data of its training")
    if config.num_classes and config.num_classes != len(data.label_names):
        raise ValueError(
            f"{data.name} has {len(data.label_names)} classes, the network {config.num_classes}: give the data of its "
            "training"
        )
    schedule, last = make_schedule(config.objective, "uniform"), first + samples
    batches = [
        _noised(config, data, schedule, range(begin, min(begin + batch_size, last)), seed, times)
        for begin in range(first, last, batch_size)
    ]
    about = {
        "data": data.name, "fingerprint": data.fingerprint, "samples": samples, "first": first, "seed": seed,
        "times": list(times),
    }
    return Calibration(batches, config.in_channels, about)


def _noised(
    config: UNetConfig, data: TrainingSet, schedule: Schedule, positions: range, seed: int, times: tuple[float, float]
) -> Batch:
    """The samples at some positions of the seed's order, with noise."""
    (low, high), shape = times, (data.channels, data.input_size, data.input_size)
    draws = draw(seed, positions, shape, latent=data.draws_latents)
    x0, labels = data.read(image_indices(seed, positions, len(data)), draws)
    t = schedule.timestep((low + (high - low) * draws.time) / NUM_TIMESTEPS)
    xt = schedule.add_noise(x0, draws.eps, t)
    inputs: dict[str, Any] = {"x": xt, "timestep": t}
    if config.num_classes:
        inputs["class_labels"] = drop_labels(labels, draws.label, LABEL_DROPOUT, config.num_classes)

    def loss(output: Tensor) -> Tensor:
        return training_loss(output.float().cpu(), x0, xt, t, draws.eps, schedule)

    return Batch(inputs, t.float(), loss)


def from_sampling(
    model: LaMambaUNet, *, samples: int = 512, seed: int = 0, times: tuple[float, float] = (0, NUM_TIMESTEPS),
    batch_size: int = BATCH_SIZE, steps: int | None = None,
) -> Calibration:
    """States of the network's own sampling without guidance, one of each image's, where there is no data.

    Classes take turns, every tenth image or so has none, and which state is taken is drawn.

    Args:
        model: the network.
        samples: how many images are sampled.
        seed: of the first.
        times: lowest and highest timestep of the states.
        steps: of the sampler, the objective's default.

    Raises:
        ValueError: when no step of the sampler lies in the range of times.
    """
    sampler = samplers_for(model.architecture.objective)[0]
    sampler = "dpm++" if sampler == "ddpm" else sampler                        # a tenth of the steps
    batches = [
        _sampled(model, range(seed + first, seed + min(first + batch_size, samples)), samples, sampler, steps, times)
        for first in range(0, samples, batch_size)
    ]
    about = {"data": f"states of {sampler}", "samples": samples, "seed": seed, "times": list(times)}
    return Calibration(batches, model.architecture.in_channels, about)


def _sampled(
    model: LaMambaUNet, seeds: range, samples: int, sampler: str, steps: int | None, times: tuple[float, float]
) -> Batch:
    """A state of the sampling of each seed's image, drawn from those in the range of times."""
    config, device, states = model.architecture, model.device, list[tuple[float, Tensor]]()
    scheduler = make_scheduler(sampler, config.objective, steps)
    generators = [np.random.default_rng([number, samples]) for number in seeds]
    labels = None
    if config.num_classes:
        labels = [
            config.num_classes if generator.random() < LABEL_DROPOUT else number % config.num_classes
            for number, generator in zip(seeds, generators, strict=True)
        ]
    guided = GuidedModel(model, scheduler.timesteps.tolist(), Guidance(1.0), labels=labels or ())
    predict = guided.predictor(labels, device)

    def record(x: Tensor, t: Tensor) -> Tensor:
        states.append((float(t.flatten()[0]), x.cpu()))
        return predict(x, t)

    noise = torch.stack([noise_of(number, (config.in_channels, *config.input_size)) for number in seeds])
    denoise(record, scheduler, noise.to(device))
    inside = [state for state in states if times[0] <= state[0] <= times[1]]
    if not inside:
        raise ValueError(f"no step of {sampler} lies between the times {times[0]:g} and {times[1]:g}; widen them")
    chosen = [inside[generator.integers(len(inside))] for generator in generators]
    t = torch.tensor([time for time, _ in chosen])
    inputs: dict[str, Any] = {"x": torch.stack([x[row] for row, (_, x) in enumerate(chosen)]), "timestep": t}
    if labels is not None:
        inputs["class_labels"] = torch.tensor(labels)
    return Batch(inputs, t)
