"""Callbacks of the training loop: sample grids and quick scores of the averaged network."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch

from lamamba.data.codec import Decoder, LatentDecoder
from lamamba.evaluation.candidates import open_images
from lamamba.evaluation.figures import moments
from lamamba.evaluation.reference import Moments, load_statistics
from lamamba.metrics.features import FeatureNetwork
from lamamba.metrics.frechet import frechet_distance
from lamamba.metrics.networks import open_network
from lamamba.metrics.statistics import Statistics
from lamamba.models.unet import LaMambaUNet
from lamamba.options.sampling import DenoisingOptions
from lamamba.options.training import SampleGridOptions, ScoreOptions
from lamamba.runs.metadata import ModelMetadata, default_guidance
from lamamba.sampling import generate
from lamamba.training.loop import StepState
from lamamba.viz.grids import grid_picture, save_picture

logger = logging.getLogger("lamamba.evaluation")

BATCH_SIZE = 64
MAX_GRID_CLASSES = 10


def open_decoder(metadata: ModelMetadata, device: torch.device) -> LatentDecoder | None:
    """The decoder of the latents that a network is trained on; None for pixels.

    Raises:
        OSError, ValueError: when the autoencoder cannot be had.
    """
    if metadata.codec == "pixels" or metadata.autoencoder is None:
        return None
    try:
        return LatentDecoder(metadata.autoencoder, metadata, device)
    except OSError as error:
        raise OSError(
            f"{error}. It is wanted for pictures while training: name where it is with --data.autoencoder, or train "
            "without them (--sampling.every 0)"
        ) from error


def _sample(
    state: StepState, network: LaMambaUNet, labels: list[int] | None, num: int, options: DenoisingOptions,
    decoder: Decoder | None,
) -> np.ndarray | None:
    """Images of seeds 0 .. num - 1, (num, h, w, c) uint8; unconditional networks are sampled without guidance.

    None, with a warning, where they are not finite: training goes on.
    """
    guidance = default_guidance(options.guidance, network.architecture.num_classes) if labels is not None else 1.0
    try:
        return generate(
            network, labels, range(num), sampler=options.sampler, num_steps=options.steps, guidance=guidance,
            batch_size=BATCH_SIZE, decoder=decoder,
        )
    except FloatingPointError as error:
        logger.warning("step %d has no samples: %s", state.step, error)
        return None


class SampleGrid:
    """A picture of samples from the averaged network every so many steps, always of the same seeds and labels.

    Args:
        options: how often, how many images of a class, and how they are sampled.
        folder: gets step_00000500.png, ...
        label_names: of the classes, of which the first ten are shown.
        decoder: of latents.
    """

    def __init__(
        self, options: SampleGridOptions, folder: Path, label_names: tuple[str, ...], decoder: Decoder | None = None
    ):
        self._options, self._folder, self._decoder = options, folder, decoder
        self._names = label_names[:MAX_GRID_CLASSES]

    def __call__(self, state: StepState) -> None:
        options = self._options
        if not options.every or (state.step % options.every and state.step != state.steps):
            return
        network = state.whole_ema()
        if network is None:                                                     # rank 0 samples
            return
        rows = max(1, len(self._names))
        labels = [row for row in range(rows) for _ in range(options.per_class)] if self._names else None
        images = _sample(state, network, labels, rows * options.per_class, options, self._decoder)
        if images is None:
            return
        picture = grid_picture(images, options.per_class, self._names)
        save_picture(picture, self._folder / f"step_{state.step:08d}.png")


class QuickScore:
    """Frechet distance of images from the averaged network every so many steps, always of the same seeds and labels.

    Lines go into scores.jsonl: {"step", "name", "score", "images"}. Rank 0 samples and evaluates; the other ranks only
    take part in gathering a sharded network.

    Args:
        options: how often, of how many images, with which features and reference.
        sampling: sampler, steps and guidance.
        path: of scores.jsonl.
        image_size: side of the images.
        decoder: of latents.
        device: of the feature network.
        is_main: whether this is rank 0.

    Raises:
        OSError, ValueError: when there is no such reference or feature network, or they do not fit together.
    """

    def __init__(
        self, options: ScoreOptions, sampling: DenoisingOptions, path: Path, image_size: int,
        decoder: Decoder | None, device: torch.device, *, is_main: bool,
    ):
        self._options, self._sampling, self._path, self._decoder = options, sampling, path, decoder
        self._evaluator: tuple[FeatureNetwork, Moments] | None = None
        if is_main:
            features = open_network(options.features, options.weights, device)
            self._evaluator = features, self._open_reference(features, image_size)

    def _open_reference(self, features: FeatureNetwork, image_size: int) -> Moments:
        name = self._options.reference
        if name == "digits":
            images = open_images(name, image_size)
            return moments(_statistics(features, images.read(range(len(images)))))
        if name is None or not name.endswith(".npz"):
            raise ValueError(
                f"score.reference={name!r} must be statistics, as lamamba evaluate stats makes them of images (an .npz "
                "file), or \"digits\""
            )
        reference = load_statistics(name)
        reference.check(features.info, (image_size, image_size, 3))
        return reference.features

    def __call__(self, state: StepState) -> None:
        options = self._options
        if state.step % options.every and state.step != state.steps:
            return
        network = state.whole_ema()
        if network is None or self._evaluator is None:
            return
        features, reference = self._evaluator
        classes = network.architecture.num_classes
        labels = [k % classes for k in range(options.images)] if classes else None
        images = _sample(state, network, labels, options.images, self._sampling, self._decoder)
        if images is None:
            return
        score = frechet_distance(*moments(_statistics(features, images)), *reference)
        line = {"step": state.step, "name": features.distance_name, "score": score, "images": options.images}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.info(f"step {state.step}  {features.distance_name} {score:.4g} of {options.images} images")


def _statistics(network: FeatureNetwork, images: np.ndarray) -> Statistics:
    """Of the features of uint8 images (n, h, w, c); grey ones are repeated for networks of colour."""
    if images.shape[-1] < network.info.channels:
        images = images.repeat(network.info.channels, axis=-1)
    pieces = [network(images[start : start + BATCH_SIZE])["features"] for start in range(0, len(images), BATCH_SIZE)]
    found = Statistics(pieces[0].shape[1])
    for piece in pieces:
        found.add(piece)
    return found
