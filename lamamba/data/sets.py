"""Training sets: clean network inputs x0 with labels, from pixels or from images encoded as they are read.

The third kind, stored latents, is in lamamba.data.latents.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig, to_pixels
from lamamba.data.images import ImageSet

T = TypeVar("T")
U = TypeVar("U")


class SampleDraws(Protocol):
    """Random numbers for reading b samples."""

    @property
    def mirror(self) -> np.ndarray:
        """(b,) bool: whether the image is mirrored."""

    @property
    def crop(self) -> np.ndarray:
        """(b, 3) uniform in [0, 1): scale, top and left of a random crop."""

    @property
    def latent(self) -> Tensor | None:
        """(b, c, h, w) standard normal, for sets with `draws_latents`."""


class TrainingSet(Protocol):
    """Clean network inputs x0, all of one shape, by index."""

    name: str
    image_size: int
    """Side of the images in pixels."""
    channels: int
    """Channels of x0."""
    input_size: int
    """Side of x0: of the images, or of their latents."""
    label_names: tuple[str, ...]
    """One name per class, in the order of the labels; empty where there are no classes."""
    codec: CodecConfig
    """How to decode x0 to images."""
    draws_latents: bool
    """Whether `read` needs draws.latent."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hash of the data; a run resumes only on the data that it began with."""
        ...

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """x0 (b, channels, input_size, input_size) float32 and labels (b,) int64 (0 where there are no classes).

        A function of its arguments alone, safe to call from several threads at once.
        """
        ...

    def files(self, indices: Sequence[int]) -> list[str]:
        """Names of the samples' files."""
        ...


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


class PixelSet:
    """An image set as x0: pixels scaled to [-1, 1].

    Args:
        images: the image set.
        mirror: flip the images left to right where draws.mirror is true.
    """

    codec, draws_latents = CodecConfig(), False

    def __init__(self, images: ImageSet, mirror: bool = False):
        self._images, self._mirror = images, mirror
        self._crop = getattr(images, "crop", "centre")
        self.name, self.label_names = images.name, images.label_names
        self.image_size = self.input_size = images.image_size
        self.channels = images.channels
        self.excluded: tuple[str, ...] = getattr(images, "excluded", ())
        """Names of the files without an index."""

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        """Hash of the image set; one without a fingerprint of its own is identified by name and length."""
        images = self._images
        own = getattr(images, "fingerprint", f"{images.name} {len(images)}")
        return _fingerprint(own, images.image_size, images.channels, self._crop)

    @property
    def source_files(self) -> Sequence[str]:
        """Names of all files, where these are single files that may be deleted one by one."""
        return getattr(self._images, "source_files", ())

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        read: Any = self._images.read
        images, labels = read(indices, draws.crop) if self._crop == "random" else read(indices)
        return to_pixels(images, draws.mirror if self._mirror else None), torch.from_numpy(labels)

    def files(self, indices: Sequence[int]) -> list[str]:
        named = getattr(self._images, "files", None)
        return named(indices) if named else [f"{self.name}[{index}]" for index in indices]


class EncodedSet(PixelSet):
    """Images encoded by a frozen autoencoder as they are read: slower than stored latents, but with random crops.

    Args:
        images: the image set.
        autoencoder: on the device where it encodes.
        mirror: flip the images left to right where draws.mirror is true.

    Raises:
        ValueError: when the autoencoder does not take the images' channels or size.
    """

    def __init__(self, images: ImageSet, autoencoder: Autoencoder, mirror: bool = False):
        if images.channels != autoencoder.in_channels:
            raise ValueError(
                f"{autoencoder} reads {autoencoder.in_channels} channels, the images have {images.channels}; "
                f"use data.channels={autoencoder.in_channels}"
            )
        super().__init__(images, mirror)
        self._autoencoder, self._process = autoencoder, os.getpid()
        self.channels, self.input_size, _ = autoencoder.latent_shape(images.image_size)
        self.codec = CodecConfig.of(autoencoder)
        self.draws_latents = autoencoder.has_posterior

    @property
    def fingerprint(self) -> str:
        return _fingerprint(super().fingerprint, self._autoencoder.sha256)

    def read(self, indices: Sequence[int], draws: SampleDraws) -> tuple[Tensor, Tensor]:
        if self._autoencoder.device.type != "cpu" and os.getpid() != self._process:
            raise RuntimeError(
                "a process that reads ahead cannot use the autoencoder on the GPU; leave processes.data_workers at 0 "
                "(threads read ahead), or encode the images once with lamamba encode"
            )
        pixels, labels = super().read(indices, draws)
        mean, std = self._autoencoder.moments(pixels)
        latents = mean.cpu()
        if std is not None:
            assert draws.latent is not None
            latents = torch.addcmul(latents, std.cpu(), draws.latent)
        return self.codec.to_x0(latents), labels


def read_ahead(function: Callable[[T], U], items: Iterable[T], *, threads: int) -> Generator[U, None, None]:
    """function(item) of every item, in order, computed ahead by threads.

    Args:
        function: safe to call from several threads at once.
        items: may be infinite.
        threads: their number; at most twice as many results are computed ahead.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
