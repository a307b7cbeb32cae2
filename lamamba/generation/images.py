"""From seeds and labels to pictures. Image k depends on seed k alone, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lamamba.data.codec import Decoder, PixelCodec
from lamamba.diffusion.denoise import Step, denoise, make_scheduler, samplers_for
from lamamba.diffusion.guidance import guided
from lamamba.models.conditioning import ConditionedNetwork
from lamamba.models.unet import LaMambaUNet


def generate(
    model: LaMambaUNet,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    *,
    sampler: str | None = None,
    num_steps: int | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
    decoder: Decoder | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Sample one image per seed.

    Args:
        model: the network; its objective decides which samplers fit.
        labels: one class per seed, 0 .. num_classes - 1; None for an unconditional network.
        seeds: each image's own, 0 .. 2^63 - 1.
        sampler: a name from lamamba.diffusion.denoise.SAMPLERS; by default the objective's first.
        num_steps: sampling steps; by default the sampler's.
        guidance: classifier-free guidance scale; 1 is none, and costs half.
        batch_size: images at a time; changes nothing but speed and memory.
        decoder: makes pictures of the network's clean output; by default its pixels are the picture's.
        on_step: told (steps done, steps in all) over the whole call.

    Returns:
        uint8 images, (len(seeds), h, w, c).

    Raises:
        ValueError: when labels, seeds, sampler or guidance do not fit the network.
    """
    config = model.architecture
    sampler = sampler or samplers_for(config.objective)[0]
    if not seeds:
        raise ValueError("no seeds were given; one image is made per seed")
    if labels is not None:
        if len(labels) != len(seeds):
            raise ValueError(f"{len(labels)} labels came with {len(seeds)} seeds; give one label per seed")
        for label in labels:
            if config.num_classes and not 0 <= label < config.num_classes:
                raise ValueError(f"label {label} is out of range; this model knows 0 .. {config.num_classes - 1}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")

    shape = (config.in_channels, *config.input_size)
    decoder, images = decoder or PixelCodec(), []
    batches = [range(start, min(start + batch_size, len(seeds))) for start in range(0, len(seeds), batch_size)]
    for number, batch in enumerate(batches):
        generators = [torch.Generator().manual_seed(seeds[k]) for k in batch]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(model.device)
        chosen = None if labels is None else torch.tensor([labels[k] for k in batch], device=model.device)
        scheduler = make_scheduler(sampler, config.objective, num_steps)
        steps_before = number * len(scheduler.timesteps)

        def report(step: Step, before: int = steps_before) -> None:
            if on_step:
                on_step(before + step.done, step.total * len(batches))

        null = [config.num_classes] if guidance != 1 else []
        present = None if labels is None else [*(labels[k] for k in batch), *null]
        network = ConditionedNetwork(model, scheduler.timesteps.tolist(), present)
        predict = guided(network, chosen, guidance, config.num_classes)
        x0 = denoise(predict, scheduler, noise, generators=generators, on_step=report)
        images.append(decoder.decode(x0))
    return np.concatenate(images)
