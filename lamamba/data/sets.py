"""What training asks of data, and two answers: pixels, and images encoded as they are read. Latents are the third."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig, PixelCodec, to_pixels
from lamamba.data.images import ImageSet

T = TypeVar("T")
U = TypeVar("U")


class SampleDraws(Protocol):
    """The random numbers of b samples that concern data; where they come from is the training's affair."""

    @property
    def mirror(self) -> np.ndarray:
        """(b,) bool: whether the image is mirrored."""

    @property
    def crop(self) -> np.ndarray:
        """(b, 3) uniform: the size and the place of a random crop."""

    @property
    def latent(self) -> Tensor | None:
        """(b, c, h, w) standard normal, where the set `draws_latents`."""


class TrainingSet(Protocol):
    """Clean network inputs x0, all of one shape, by number."""

    name: str
    image_size: int
    """Side in pixels of the images behind the samples."""
    channels: int
    """Channels of x0."""
    input_size: int
    """Side of x0: that of the images, or of their latents."""
    label_names: tuple[str, ...]
    """One name per class, in the order of the labels; empty where there are no classes."""
    facts: CodecConfig
    """What x0 is made of, for whoever must make pictures of it."""
    draws_latents: bool
    """Whether `read` wants draws.latent."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Which data this is: a run that resumes on other data would not be the same run."""
        ...

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """x0 (b, channels, input_size, input_size) float32 and labels (b,) int64 (0 where there are no classes).

        A function of its arguments alone, safe to call from several threads at once.
        """
        ...

    def files(self, indices: Sequence[int]) -> list[str]:
        """Names for people: the file of each sample."""
        ...


def _read_images(images: ImageSet, indices: Sequence[int], draws: SampleDraws) -> tuple[np.ndarray, np.ndarray]:
    if getattr(images, "crop", "centre") == "random":
        return images.read(indices, draws.crop)  # type: ignore[call-arg]
    return images.read(indices)


def _files(images: ImageSet, indices: Sequence[int]) -> list[str]:
    named = getattr(images, "files", None)
    return named(indices) if named else [f"{images.name}[{index}]" for index in indices]


def _left_out(images: ImageSet) -> tuple[str, ...]:
    return getattr(images, "left_out", ())


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _images_fingerprint(images: ImageSet) -> str:
    """A set that does not say what it holds is known by name and length."""
    told = getattr(images, "fingerprint", f"{images.name} {len(images)}")
    return _fingerprint(told, images.image_size, images.channels, getattr(images, "crop", "centre"))


class PixelSet:
    """An image set whose pixels are what the network reads, scaled to [-1, 1]."""

    facts, draws_latents = PixelCodec.facts, False

    def __init__(self, images: ImageSet, mirror: bool = False):
        self._images, self._mirror, self._codec = images, mirror, PixelCodec()
        self.name, self.label_names = images.name, images.label_names
        self.image_size = self.input_size = images.image_size
        self.channels = images.channels
        self.left_out = _left_out(images)
        """Files that no index counts."""

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        return _images_fingerprint(self._images)

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        pictures, labels = _read_images(self._images, indices, draws)
        return self._codec.encode(pictures, draws.mirror if self._mirror else None), torch.from_numpy(labels)

    def files(self, indices: Sequence[int]) -> list[str]:
        return _files(self._images, indices)


class EncodedSet:
    """Images that a frozen autoencoder encodes whenever they are read: slow, but free to crop anew each time.

    Raises:
        ValueError: when images and autoencoder do not fit together.
    """

    def __init__(self, images: ImageSet, autoencoder: Autoencoder, mirror: bool = False):
        if images.channels != autoencoder.in_channels:
            raise ValueError(
                f"{autoencoder} reads {autoencoder.in_channels} channels, the images have {images.channels}; "
                f"use data.channels={autoencoder.in_channels}"
            )
        self._images, self._autoencoder, self._mirror = images, autoencoder, mirror
        self._process = os.getpid()
        self.left_out = _left_out(images)
        """Files that no index counts."""
        self.name, self.label_names, self.image_size = images.name, images.label_names, images.image_size
        self.channels, self.input_size, _ = autoencoder.latent_shape(images.image_size)
        self.facts = CodecConfig.of(autoencoder)
        self.draws_latents = autoencoder.has_posterior

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(_images_fingerprint(self._images), self._autoencoder.sha256)

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        if self._autoencoder.device.type != "cpu" and os.getpid() != self._process:
            raise RuntimeError(
                "a process that reads ahead cannot use the autoencoder on the GPU; leave processes.data_workers at 0 "
                "(threads read ahead), or encode the images once with lamamba encode"
            )
        pictures, labels = _read_images(self._images, indices, draws)
        mean, std = self._autoencoder.moments(to_pixels(pictures, draws.mirror if self._mirror else None))
        latents = mean.cpu()
        if std is not None:
            assert draws.latent is not None
            latents = torch.addcmul(latents, std.cpu(), draws.latent)
        return self.facts.to_x0(latents), torch.from_numpy(labels)

    def files(self, indices: Sequence[int]) -> list[str]:
        return _files(self._images, indices)


def read_ahead(
    function: Callable[[T], U], items: Iterable[T], *, threads: int, depth: int | None = None
) -> Iterator[U]:
    """function(item) of every item, in their order, worked out ahead by threads.

    Args:
        function: safe to call from several threads at once.
        items: may go on for ever.
        threads: how many.
        depth: results that may wait to be fetched; by default twice the threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > (2 * threads if depth is None else depth):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
