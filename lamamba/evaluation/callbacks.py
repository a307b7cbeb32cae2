"""Callbacks of the training loop: sample grids and quick scores of the averaged network.

What they need is checked when they are made, before anything is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lamamba.data.codec import Decode, LatentDecoder, to_uint8
from lamamba.diffusion.denoise import make_scheduler, samplers_for
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
from lamamba.utils.files import append_json
from lamamba.utils.progress import Progress, Report
from lamamba.viz.curves import SCORES, read_metrics
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
            f"{error}. It is wanted for pictures while training: name where it is with data.autoencoder, or train "
            "without them (sampling.every=0)"
        ) from error


def _sample(
    network: LaMambaUNet, labels: list[int] | None, num: int, options: DenoisingOptions, decode: Decode,
    report: Report,
) -> np.ndarray | None:
    """Images of seeds 0 .. num - 1, (num, h, w, c) uint8; unconditional networks are sampled without guidance.

    None, with a warning, where they are not finite: training goes on.
    """
    guidance = default_guidance(options.guidance, network.architecture.num_classes) if labels is not None else 1.0
    try:
        return generate(
            network, labels, range(num), sampler=options.sampler, num_steps=options.steps, guidance=guidance,
            batch_size=BATCH_SIZE, decode=decode,
            on_step=lambda done, total: report(Progress("sampling", done, total, unit="steps")),
        )
    except FloatingPointError as error:
        logger.warning("no samples of this step: %s", error)
        return None


def _write(path: Path, write: Callable[[], None]) -> None:
    """Call a function that writes a file; a full disk is logged, and training goes on."""
    try:
        write()
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)


def check_sampler(options: DenoisingOptions, metadata: ModelMetadata) -> None:
    """Check the sampler of pictures and scores before anything is trained.

    Raises:
        ValueError: when it is unknown, is for models of another kind, or does not take so many steps.
    """
    try:
        make_scheduler(options.sampler or samplers_for(metadata.objective)[0], metadata.objective, options.steps)
    except ValueError as error:
        raise ValueError(f"sampling: {error}") from None


class SampleGrid:
    """A picture of samples from the averaged network every so many steps, always of the same seeds and labels.

    Args:
        options: how often, how many images of a class, and how they are sampled.
        folder: gets step_00000500.png, ...
        label_names: of the classes, of which the first ten are shown.
        decode: makes images of x0.
        report: gets the progress of the sampling.
    """

    def __init__(
        self, options: SampleGridOptions, folder: Path, label_names: tuple[str, ...], decode: Decode = to_uint8,
        report: Report = lambda progress: None,
    ):
        self._options, self._folder, self._decode, self._report = options, folder, decode, report
        self._names = label_names[:MAX_GRID_CLASSES]

    def __call__(self, state: StepState, *, if_missing: bool = False) -> None:
        """Make the picture of a step where it is due; with `if_missing`, unless it is there."""
        options, path = self._options, self._folder / f"step_{state.step:08d}.png"
        if not options.every or (state.step % options.every and state.step != state.steps):
            return
        network = state.whole_ema()
        if network is None or (if_missing and path.exists()):                   # rank 0 samples
            return
        rows = max(1, len(self._names))
        labels = [row for row in range(rows) for _ in range(options.per_class)] if self._names else None
        images = _sample(network, labels, rows * options.per_class, options, self._decode, self._report)
        if images is not None:
            _write(path, lambda: save_picture(grid_picture(images, options.per_class, self._names), path))


class QuickScore:
    """Frechet distance of images from the averaged network every so many steps, always of the same seeds and labels.

    Lines go into scores.jsonl: {"step", "name", "score", "images"}. Rank 0 samples and evaluates; the other ranks only
    take part in gathering a sharded network.

    Args:
        options: how often, of how many images, with which features and reference.
        sampling: sampler, steps and guidance.
        path: of scores.jsonl.
        shape: of an image: height, width, channels.
        decode: makes images of x0.
        device: of the feature network.
        is_rank_zero: whether this is rank 0.
        report: gets the progress of the sampling.

    Raises:
        OSError, ValueError: when there is no such reference or feature network, or they do not fit together.
    """

    def __init__(
        self, options: ScoreOptions, sampling: DenoisingOptions, path: Path, shape: tuple[int, int, int],
        decode: Decode, device: torch.device, *, is_rank_zero: bool, report: Report = lambda progress: None,
    ):
        self._options, self._sampling, self._path, self._decode = options, sampling, path, decode
        self._report = report
        self._evaluator: tuple[FeatureNetwork, Moments] | None = None
        if is_rank_zero:
            features = open_network(options.features, options.weights, device)
            self._evaluator = features, self._open_reference(features, shape)

    def _open_reference(self, features: FeatureNetwork, shape: tuple[int, int, int]) -> Moments:
        """Mean and covariance of the reference; the features of two black images show that they fit."""
        name = self._options.reference
        if shape[2] > features.info.channels:
            raise ValueError(
                f"score.features={self._options.features!r} reads grey images, and this run makes colour; choose others"
            )
        if name == "digits":
            images = open_images(name, shape[0])
            reference = moments(_statistics(features, images.read(range(len(images)))))
        elif name is None or not name.endswith(".npz"):
            raise ValueError(
                f"score.reference={name!r} must be statistics, as lamamba evaluate stats makes them of images (an .npz "
                "file), or \"digits\""
            )
        else:
            statistics = load_statistics(name)
            statistics.check(features.info, shape)
            reference = statistics.features
        mean, _ = moments(_statistics(features, np.zeros((2, *shape), np.uint8)))
        if len(mean) != len(reference[0]):
            raise ValueError(f"score.reference={name} is of {len(reference[0])} features, and these are {len(mean)}")
        return reference

    def __call__(self, state: StepState, *, if_missing: bool = False) -> None:
        """Write the score of a step where it is due; with `if_missing`, unless it is there."""
        options = self._options
        if state.step % options.every and state.step != state.steps:
            return
        network = state.whole_ema()
        if network is None or self._evaluator is None or (if_missing and state.step in self._scored_steps()):
            return
        features, reference = self._evaluator
        classes = network.architecture.num_classes
        labels = [k % classes for k in range(options.images)] if classes else None
        images = _sample(network, labels, options.images, self._sampling, self._decode, self._report)
        if images is None:
            return
        score = frechet_distance(*moments(_statistics(features, images)), *reference)
        line = {"step": state.step, "name": features.distance_name, "score": score, "images": options.images}
        _write(self._path, lambda: append_json(self._path, line))
        logger.info(f"step {state.step}  {features.distance_name} {score:.4g} of {options.images} images")

    def _scored_steps(self) -> set[int]:
        found = read_metrics(self._path, SCORES, may_be_empty=True) if self._path.is_file() else []
        return {line["step"] for line in found}


def _statistics(network: FeatureNetwork, images: np.ndarray) -> Statistics:
    """Of the features of uint8 images (n, h, w, c); grey ones are repeated for networks of colour."""
    if images.shape[-1] < network.info.channels:
        images = images.repeat(network.info.channels, axis=-1)
    pieces = [network(images[start : start + BATCH_SIZE])["features"] for start in range(0, len(images), BATCH_SIZE)]
    found = Statistics(pieces[0].shape[1])
    for piece in pieces:
        found.add(piece)
    return found
