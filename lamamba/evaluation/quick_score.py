"""A small Frechet distance while training goes on, to see which way it goes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from lamamba.data.codec import Decoder
from lamamba.evaluation.candidates import open_images
from lamamba.evaluation.figures import moments
from lamamba.evaluation.reference import Moments, load_statistics
from lamamba.metrics.features import FeatureNetwork
from lamamba.metrics.frechet import frechet_distance
from lamamba.metrics.networks import open_network
from lamamba.metrics.statistics import Statistics
from lamamba.options.training import SamplingOptions, ScoreOptions
from lamamba.sampling import generate
from lamamba.training.loop import StepState

BATCH_SIZE = 64


class QuickScore:
    """Every so often the Frechet distance of images from the averaged weights, always of the same seeds and labels.

    Lines go into scores.jsonl: {"step", "name", "score", "images"}. Only the main process draws and judges.

    Args:
        options: how often, of how many images, beside what.
        sampling: sampler, steps and guidance.
        path: of scores.jsonl.
        image_size: side of the pictures.
        decoder: makes pictures of latents.
        device: where the feature network works.
        judges: whether this process draws and judges; the others only help to put a split network together.

    Raises:
        OSError, ValueError: when there is no such reference or feature network, or they do not fit together.
    """

    def __init__(
        self, options: ScoreOptions, sampling: SamplingOptions, path: Path, image_size: int,
        decoder: Decoder | None, device: torch.device, *, judges: bool,
    ):
        self._options, self._sampling, self._path, self._decoder = options, sampling, path, decoder
        self._judge: tuple[FeatureNetwork, Moments] | None = None
        if judges:
            features = open_network(options.features, options.weights, device)
            self._judge = features, self._open_reference(features, image_size)

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

    def __call__(self, moment: StepState) -> None:
        options, sampling = self._options, self._sampling
        if moment.step % options.every and moment.step != moment.steps:
            return
        network = moment.whole_ema()
        if network is None or self._judge is None:
            return
        features, reference = self._judge
        classes = network.architecture.num_classes
        labels = [k % classes for k in range(options.images)] if classes else None
        images = generate(
            network, labels, range(options.images), sampler=sampling.sampler, num_steps=sampling.num_steps,
            guidance=sampling.guidance if classes else 1.0, batch_size=BATCH_SIZE, decoder=self._decoder,
        )
        score = frechet_distance(*moments(_statistics(features, images)), *reference)
        line = {"step": moment.step, "name": features.distance_name, "score": score, "images": options.images}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"step {moment.step}  {features.distance_name} {score:.4g} of {options.images} images", flush=True)


def _statistics(network: FeatureNetwork, images: np.ndarray) -> Statistics:
    """Of the features of uint8 images (n, h, w, c); grey ones are repeated for networks of colour."""
    if images.shape[-1] < network.info.channels:
        images = images.repeat(network.info.channels, axis=-1)
    pieces = [network(images[start : start + BATCH_SIZE])["features"] for start in range(0, len(images), BATCH_SIZE)]
    found = Statistics(pieces[0].shape[1])
    for piece in pieces:
        found.add(piece)
    return found
