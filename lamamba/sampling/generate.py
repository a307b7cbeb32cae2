"""From seeds and labels to images: the one path of the command line, the pipeline, the page and evaluation.

Image k depends on seed k alone, whatever the batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lamamba.config import Grid, UNetConfig
from lamamba.data.codec import Decode, to_uint8
from lamamba.diffusion.denoise import SAMPLERS, Step, denoise, make_scheduler, samplers_for, slerp
from lamamba.diffusion.guidance import Guidance, Predict, check_guidance, check_guiding_model, guided
from lamamba.inference.conditioning import conditioned
from lamamba.models.deep_cache import LaMambaCacheConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.sampling.settings import MAX_SEED, Interpolated

DEFAULT_BATCH_SIZE = 64
"""Images at a time."""
Preview = Callable[[range, int, Tensor], None]
"""Called after every step: a batch's positions among the images, steps done, x0 (b, c, h, w) as it is predicted."""


class GuidedModel:
    """A network with its guidance, for batch after batch; conditioning is computed once for all of them.

    Args:
        model: the network.
        timesteps: those that the scheduler will go through.
        guidance: how far to guide.
        guiding_model: a second network to guide by, in place of the first one with the null label (autoguidance).
        labels: all labels of the run. Where the rows of all of them fit into memory they are kept for all batches;
            otherwise each batch has its own.
        cache: how deep features are kept between steps, each network's and each guidance branch's its own; by default
            as it was enabled for the networks themselves.

    Raises:
        ValueError: when guidance or the guiding model do not fit the network, or the run is too short for the cache.
    """

    def __init__(
        self, model: LaMambaUNet, timesteps: Sequence[float], guidance: Guidance, *,
        guiding_model: LaMambaUNet | None = None, labels: Iterable[int] = (), cache: LaMambaCacheConfig | None = None,
    ):
        self._config, self._num_classes, self._guidance = model.architecture, model.config["num_classes"], guidance
        self._is_flow_map = self._config.objective == "flow-map"
        check_guidance(self._config, guidance, has_guiding_model=guiding_model is not None)
        networks = [model]
        if guiding_model is not None:
            check_guiding_model(model.architecture, guiding_model.architecture)
            networks.append(guiding_model)
        self._networks = [conditioned(network, timesteps, cache) for network in networks]
        self._run_labels = self._with_null(labels)

    def _with_null(self, labels: Iterable[int]) -> frozenset[int]:
        needs_null = self._guidance.scale != 1 and len(self._networks) == 1 and not self._is_flow_map
        return frozenset(labels) | ({self._num_classes} if needs_null else set())

    def predictor(
        self, labels: Sequence[int] | None, device: torch.device, mixtures: Tensor | None = None,
        scale: Callable[[], float] | None = None,
    ) -> Predict:
        """The guided prediction for one run over a batch with these labels, as a function of (x, t) for `denoise`.

        Args:
            labels: one per image; None for an unconditional network.
            device: of x.
            mixtures: (m, num_classes + 1) weights of label embeddings; label num_classes + 1 + i means the i-th.
            scale: called before every evaluation for the guidance scale, which may change on the way.
        """
        for network in self._networks:
            network.begin(None if labels is None else len(labels))
        predict = self._predictor(labels, device, mixtures)
        if scale is None:
            return predict

        def predict_by_scale(x: Tensor, t: Tensor) -> Tensor:
            nonlocal predict
            if scale() != self._guidance.scale:
                self._guidance = dataclasses.replace(self._guidance, scale=scale())
                predict = self._predictor(labels, device, mixtures)
            return predict(x, t)

        return predict_by_scale

    def _predictor(self, labels: Sequence[int] | None, device: torch.device, mixtures: Tensor | None) -> Predict:
        if labels is not None:
            present = self._with_null(labels)
            for network in self._networks:
                keeps_all = mixtures is None and present <= self._run_labels and network.fits(self._run_labels)
                network.prepare(self._run_labels if keeps_all else present, mixtures)
        guidance = self._guidance
        if self._is_flow_map:                                                   # the scale is an input: one evaluation
            check_guidance(self._config, guidance)
            self._networks[0].set_guidance_scale(guidance.scale)
            guidance = Guidance(1.0)
        return guided(
            self._networks[0], None if labels is None else torch.tensor(labels, device=device), guidance,
            self._num_classes, guiding_model=self._networks[1] if len(self._networks) > 1 else None,
        )


@contextmanager
def resized(networks: Sequence[LaMambaUNet | None], input_size: Grid) -> Iterator[None]:
    """Run networks on another input size (height, width) for a while; those that are None are skipped.

    Raises:
        ValueError: when the size does not split into patches.
    """
    before: list[tuple[LaMambaUNet, Grid]] = []
    try:
        for network in filter(None, networks):
            p = network.config["patch_size"]
            if input_size[0] % p or input_size[1] % p:
                raise ValueError(
                    f"input_size={tuple(input_size)} does not split into patches of {p}: see UNetConfig.fit_input"
                )
            before.append((network, network.run_grid))
            _set_grid(network, (input_size[0] // p, input_size[1] // p))
        yield
    finally:
        for network, grid in before:
            _set_grid(network, grid)


def _set_grid(network: LaMambaUNet, grid: Grid) -> None:
    if network.run_grid != grid:
        network.set_grid(grid)


class ImageGenerator:
    """Seeds and labels to images, call after call with the same settings.

    Args:
        model: the network; its objective decides which samplers fit.
        sampler: a name from lamamba.diffusion.denoise.SAMPLERS; by default the objective's first.
        num_steps: sampling steps; by default the sampler's.
        guidance: how far to guide, or its scale alone; 1 is none, and costs half (of flow maps, as much).
        guiding_model: a second network to guide by, in place of the first one with the null label (autoguidance).
        input_size: height and width of the network's input; by default what it was made for.
        batch_size: images at a time; changes nothing but speed and memory.
        decode: makes images of the network's clean output; by default that is the image's pixels.
        labels: all labels of the calls, where they are known: their conditioning is kept between batches and calls.
        cache: how deep features are kept between steps; by default as `LaMambaUNet.enable_cache` has set it.

    Raises:
        ValueError: when sampler, size, guidance or the guiding model do not fit the network, or the run is too short
            for the cache.
    """

    def __init__(
        self, model: LaMambaUNet, *, sampler: str | None = None, num_steps: int | None = None,
        guidance: Guidance | float = 1.0, guiding_model: LaMambaUNet | None = None, input_size: Grid | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE, decode: Decode = to_uint8, labels: Iterable[int] = (),
        cache: LaMambaCacheConfig | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        config = model.architecture
        self._model, self._guiding_model, self._batch_size = model, guiding_model, batch_size
        self._sampler, self._num_steps = sampler or samplers_for(config.objective)[0], num_steps
        self._input_size, self._decode = input_size or config.input_size, decode
        timesteps = make_scheduler(self._sampler, config.objective, num_steps).timesteps.tolist()
        self._guided = GuidedModel(
            model, timesteps, guidance if isinstance(guidance, Guidance) else Guidance(float(guidance)),
            guiding_model=guiding_model, labels=labels, cache=cache,
        )

    def __call__(
        self, labels: Sequence[int | Interpolated] | None, seeds: Sequence[int | Interpolated], *,
        on_step: Callable[[int, int], None] | None = None, preview: Preview | None = None,
    ) -> np.ndarray:
        """One image per seed: uint8 (len(seeds), h, w, c).

        Args:
            labels: one class per seed, 0 .. num_classes - 1, or between two; None for an unconditional network.
            seeds: each image's own, 0 .. 2^63 - 1, or between two: their noises, mixed along the sphere.
            on_step: called with (steps done, steps in all) of this call.
            preview: called with what the images look like on the way.

        Raises:
            ValueError: when labels or seeds do not fit the network.
        """
        _check(self._model.architecture, labels, seeds, self._sampler)
        starts = range(0, len(seeds), self._batch_size)
        images = []
        with resized([self._model, self._guiding_model], self._input_size):
            for number, start in enumerate(starts):
                batch = range(start, min(start + self._batch_size, len(seeds)))

                def report(step: Step, batch: range = batch, before: int = number) -> None:
                    if on_step:
                        on_step(before * step.total + step.done, step.total * len(starts))
                    if preview:
                        preview(batch, step.done, step.x0)

                chosen = None if labels is None else [labels[k] for k in batch]
                images.append(self._generate(chosen, [seeds[k] for k in batch], report))
        return np.concatenate(images)

    def _generate(
        self, labels: Sequence[int | Interpolated] | None, seeds: Sequence[int | Interpolated],
        on_step: Callable[[Step], None],
    ) -> np.ndarray:
        """One batch."""
        config, device = self._model.architecture, self._model.device
        shape = (config.in_channels, *self._input_size)
        noise = torch.stack([noise_of(seed, shape) for seed in seeds]).to(device)
        numbers, mixtures = _as_numbers(labels, config.num_classes)
        x0 = denoise(
            self._guided.predictor(numbers, device, mixtures),
            make_scheduler(self._sampler, config.objective, self._num_steps), noise,
            generators=[_generator_after(seed, shape) for seed in seeds], on_step=on_step,
        )
        return self._decode(x0)


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
    batch_size: int = DEFAULT_BATCH_SIZE,
    decode: Decode = to_uint8,
    cache: LaMambaCacheConfig | None = None,
    on_step: Callable[[int, int], None] | None = None,
    preview: Preview | None = None,
) -> np.ndarray:
    """Sample one image per seed: uint8 (len(seeds), h, w, c). Image k depends on seed k alone.

    Arguments and errors are those of `ImageGenerator` and of its call.
    """
    numbers = {label for label in labels or () if not isinstance(label, Interpolated)}
    images = ImageGenerator(
        model, sampler=sampler, num_steps=num_steps, guidance=guidance, guiding_model=guiding_model,
        input_size=input_size, batch_size=batch_size, decode=decode, labels=numbers, cache=cache,
    )
    return images(labels, seeds, on_step=on_step, preview=preview)


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
    config: UNetConfig, labels: Sequence[int | Interpolated] | None, seeds: Sequence[int | Interpolated], sampler: str
) -> None:
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
