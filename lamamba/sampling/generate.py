"""From seeds and labels to pictures. Image k depends on seed k alone, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lamamba.config import Grid
from lamamba.data.codec import Decoder, PixelCodec
from lamamba.diffusion.denoise import SAMPLERS, Step, denoise, make_scheduler, samplers_for, slerp
from lamamba.diffusion.guidance import Guidance, check_guiding_model, guided
from lamamba.inference.conditioning import ConditionedNetwork
from lamamba.models.unet import LaMambaUNet
from lamamba.sampling.settings import MAX_SEED, Interpolated

Watch = Callable[[range, int, Tensor], None]
"""Told in every step: places of a batch's images, steps done, and x0 (b, c, h, w) as the network sees it by then."""


def generate(
    model: LaMambaUNet,
    labels: Sequence[int | Interpolated] | None,
    seeds: Sequence[int | Interpolated],
    *,
    sampler: str | None = None,
    num_steps: int | None = None,
    guidance: Guidance | float = 1.0,
    guiding_model: LaMambaUNet | None = None,
    input_size: Grid | None = None,
    batch_size: int = 64,
    decoder: Decoder | None = None,
    on_step: Callable[[int, int], None] | None = None,
    watch: Watch | None = None,
) -> np.ndarray:
    """Sample one image per seed.

    Args:
        model: the network; its objective decides which samplers fit.
        labels: one class per seed, 0 .. num_classes - 1, or a place between two; None for an unconditional network.
        seeds: each image's own, 0 .. 2^63 - 1, or a place between two: their noises, mixed on the arc between them.
        sampler: a name from lamamba.diffusion.denoise.SAMPLERS; by default the objective's first.
        num_steps: sampling steps; by default the sampler's.
        guidance: how far to guide, or its scale alone; 1 is none, and costs half.
        guiding_model: a second network to guide by, instead of the first one without labels (autoguidance).
        input_size: height and width of the network's input; by default what it was made for.
        batch_size: images at a time; changes nothing but speed and memory.
        decoder: makes pictures of the network's clean output; by default its pixels are the picture's.
        on_step: told (steps done, steps in all) over the whole call.
        watch: told what the images look like on the way.

    Returns:
        uint8 images, (len(seeds), h, w, c).

    Raises:
        ValueError: when labels, seeds, sampler, size, guidance or the guiding model do not fit the network.
    """
    config = model.architecture
    sampler = sampler or samplers_for(config.objective)[0]
    if not isinstance(guidance, Guidance):
        guidance = Guidance(float(guidance))
    _check(model, labels, seeds, sampler, guiding_model)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")

    input_size = input_size or config.input_size
    shape = (config.in_channels, *input_size)
    decoder, images = decoder or PixelCodec(), []
    batches = [range(start, min(start + batch_size, len(seeds))) for start in range(0, len(seeds), batch_size)]
    networks = [model] if guiding_model is None else [model, guiding_model]
    with _resized(networks, input_size):
        for number, batch in enumerate(batches):
            chosen_seeds = [seeds[k] for k in batch]
            noise = torch.stack([noise_of(seed, shape) for seed in chosen_seeds]).to(model.device)
            generators = [_generator_after(seed, shape) for seed in chosen_seeds]
            scheduler = make_scheduler(sampler, config.objective, num_steps)
            steps = len(scheduler.timesteps)

            def report(step: Step, batch: range = batch, before: int = number * steps) -> None:
                if on_step:
                    on_step(before + step.done, step.total * len(batches))
                if watch:
                    watch(batch, step.done, step.x0)

            chosen = None if labels is None else [labels[k] for k in batch]
            null = [config.num_classes] if guidance.scale != 1 and guiding_model is None else []
            numbers, mixtures = _as_numbers(chosen, config.num_classes)
            present = None if numbers is None else [*numbers, *null]
            first, *others = [
                ConditionedNetwork(network, scheduler.timesteps.tolist(), present, mixtures=mixtures)
                for network in networks
            ]
            predict = guided(
                first, None if numbers is None else torch.tensor(numbers, device=model.device), guidance,
                config.num_classes, guiding_model=others[0] if others else None,
            )
            x0 = denoise(predict, scheduler, noise, generators=generators, on_step=report)
            images.append(decoder.decode(x0))
    return np.concatenate(images)


def noise_of(seed: int | Interpolated, shape: Sequence[int]) -> Tensor:
    """The noise that an image starts from: (c, h, w), standard normal.

    Between two seeds it moves on the arc from one noise to the other, whose lengths are nearly the same.
    """
    if not isinstance(seed, Interpolated):
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    first, second = noise_of(seed.first, shape), noise_of(seed.second, shape)
    return slerp(first[None], second[None], seed.weight)[0]


def _generator_after(seed: int | Interpolated, shape: Sequence[int]) -> torch.Generator:
    """The image's own generator, after it has drawn the noise that the image starts from."""
    generator = torch.Generator().manual_seed(seed.first if isinstance(seed, Interpolated) else seed)
    torch.randn(tuple(shape), generator=generator)
    return generator


def _as_numbers(
    labels: Sequence[int | Interpolated] | None, num_classes: int
) -> tuple[list[int] | None, Tensor | None]:
    """Labels as numbers; those between two as num_classes + 1 and on, with weights (m, num_classes + 1) of those."""
    if labels is None:
        return None, None
    mixed = list(dict.fromkeys(label for label in labels if isinstance(label, Interpolated)))
    if not mixed:
        return [int(label) for label in labels if not isinstance(label, Interpolated)], None
    weights = torch.zeros(len(mixed), num_classes + 1)
    for row, label in enumerate(mixed):
        weights[row, label.first] += 1 - label.weight
        weights[row, label.second] += label.weight
    numbers = {label: num_classes + 1 + row for row, label in enumerate(mixed)}
    return [numbers[label] if isinstance(label, Interpolated) else int(label) for label in labels], weights


def _check(
    model: LaMambaUNet, labels: Sequence[int | Interpolated] | None, seeds: Sequence[int | Interpolated], sampler: str,
    guiding_model: LaMambaUNet | None,
) -> None:
    config = model.architecture
    if not seeds:
        raise ValueError("no seeds were given; one image is made per seed")
    for seed in seeds:
        for end in (seed.first, seed.second) if isinstance(seed, Interpolated) else (seed,):
            if not 0 <= end <= MAX_SEED:
                raise ValueError(f"seed {end} is out of range; seeds are 0 .. {MAX_SEED}")
    if labels is not None:
        if len(labels) != len(seeds):
            raise ValueError(f"{len(labels)} labels came with {len(seeds)} seeds; give one label per seed")
        for label in labels:
            for end in (label.first, label.second) if isinstance(label, Interpolated) else (label,):
                if config.num_classes and not 0 <= end < config.num_classes:
                    raise ValueError(f"label {end} is out of range; this model knows 0 .. {config.num_classes - 1}")
    between = any(isinstance(seed, Interpolated) and seed.first != seed.second for seed in seeds)
    if between and sampler in SAMPLERS and SAMPLERS[sampler].is_stochastic:
        quiet = [name for name in samplers_for(config.objective) if not SAMPLERS[name].is_stochastic]
        raise ValueError(
            f"sampler {sampler!r} draws noise on the way, so there is no path between two seeds; use "
            f"{' or '.join(quiet)}"
        )
    if guiding_model is not None:
        check_guiding_model(config, guiding_model.architecture)


@contextmanager
def _resized(networks: Sequence[LaMambaUNet], input_size: Grid) -> Iterator[None]:
    """Networks on another input size for a while."""
    changed = [network for network in networks if tuple(network.architecture.input_size) != tuple(input_size)]
    for network in changed:
        p = network.architecture.patch_size
        for side in input_size:
            if side % p:
                raise ValueError(f"input_size={tuple(input_size)} does not split into patches of {p}: see "
                                 "UNetConfig.fit_input")
        network.set_grid((input_size[0] // p, input_size[1] // p))
    try:
        yield
    finally:
        for network in changed:
            network.set_grid(None)
