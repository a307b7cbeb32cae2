"""Where data enters the loop: samples by place in the run, read in this process or ahead of it by workers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from lamamba.data.codec import PixelCodec
from lamamba.data.images import ImageSet
from lamamba.training.config import TrainConfig
from lamamba.training.draws import Draws, draw, image_indices, split_held_out
from lamamba.training.interrupt import ignore_in_worker
from lamamba.training.processes import Processes, part


class Samples(Protocol):
    """What the loop asks of data: clean network inputs x0, of one shape, by index."""

    name: str
    image_size: int
    """Side in pixels of the images behind the samples."""
    channels: int
    """Channels of x0."""
    input_size: int
    """Side of x0: that of the images, or of their latents."""
    codec: str
    """"pixels" or "latents", as a sampler must know it."""
    scale: float
    """Factor on the codec's output before the network sees it; 1 for pixels."""
    label_names: tuple[str, ...]
    """One name per class, in the order of the labels; empty where there are no classes."""
    draws_latents: bool
    """Whether `read` wants draws.latent."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        """x0 (b, channels, input_size, input_size) float32 and labels (b,) int64 (0 where there are no classes)."""
        ...

    def files(self, indices: Sequence[int]) -> list[str]:
        """Names for people: the file of each sample."""
        ...


class PixelSamples:
    """An image set whose pixels are what the network reads, scaled to [-1, 1]."""

    codec, scale, draws_latents = "pixels", 1.0, False

    def __init__(self, images: ImageSet, mirror: bool):
        self._images, self._mirror, self._codec = images, mirror, PixelCodec()
        self.name, self.label_names = images.name, images.label_names
        self.image_size = self.input_size = images.image_size
        self.channels = images.channels

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        pictures, labels = self._images.read(indices)
        return self._codec.encode(pictures, draws.mirror if self._mirror else None), torch.from_numpy(labels)

    def files(self, indices: Sequence[int]) -> list[str]:
        named = getattr(self._images, "files", None)
        return named(indices) if named else [f"{self.name}[{index}]" for index in indices]


def as_samples(data: ImageSet | Samples, config: TrainConfig) -> Samples:
    """Samples as they are; an image set as pixels."""
    if hasattr(data, "input_size"):
        return cast(Samples, data)
    return PixelSamples(cast(ImageSet, data), config.data.mirror)


@dataclass(frozen=True)
class Batch:
    """Some samples and their random numbers."""

    indices: list[int]
    """Of the samples, in the data."""
    x0: Tensor
    """(b, c, h, w) float32."""
    labels: Tensor
    """(b,) int64."""
    time: Tensor
    """(b,) uniform."""
    label_draw: Tensor
    """(b,) uniform."""
    eps: Tensor
    """(b, c, h, w)."""

    def pin_memory(self) -> Batch:
        """For quick copies to a GPU; DataLoader asks for it by this name."""
        tensors = (self.x0, self.labels, self.time, self.label_draw, self.eps)
        return Batch(self.indices, *(tensor.pin_memory() for tensor in tensors))


class Feed:
    """The batches of a run for one process, each in `accumulation_steps` pieces, from any batch on.

    Batch k holds the samples at places k batch_size .. (k + 1) batch_size - 1, whoever reads them.
    """

    def __init__(self, samples: Samples, config: TrainConfig, processes: Processes):
        self._samples, self._config = samples, config                           # workers get a copy: nothing else
        self._index, self._count, self._pins = processes.index, processes.count, processes.device.type == "cuda"
        self._shape = (samples.channels, samples.input_size, samples.input_size)
        self._trained, self._held_out = split_held_out(config.seed, len(samples), config.watch.held_out)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """Piece `key[1]` of this process's share of batch `key[0]`."""
        number, piece = key
        size = self._config.batch_size
        share = part(range(number * size, (number + 1) * size), self._index, self._count)
        places = part(share, piece, self._config.processes.accumulation_steps)
        return self._read(places, self._trained[image_indices(self._config.seed, places, len(self._trained))])

    def _read(self, places: Sequence[int], indices: np.ndarray, *, held_out: bool = False) -> Batch:
        draws = draw(
            self._config.seed, places, self._shape, latent=self._samples.draws_latents, held_out=held_out
        )
        x0, labels = self._samples.read(indices.tolist(), draws)
        return Batch(indices.tolist(), x0, labels, draws.time, draws.label, draws.eps)

    def held_out(self, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """This process's share of the held-out images at their fixed numbers, and how many of each batch count.

        Their times are spread evenly. Every process has as many batches: a short one is filled up.
        """
        count = len(self._held_out)
        mine = part(range(count), self._index, self._count)
        rounds = math.ceil(math.ceil(count / self._count) / batch_size)
        for number in range(rounds):
            chosen = list(mine[number * batch_size : (number + 1) * batch_size])
            filled = chosen or [0]
            batch = self._read(filled, self._held_out[filled], held_out=True)
            times = (torch.tensor(filled, dtype=torch.float64) + 0.5) / count
            yield Batch(**{**vars(batch), "time": times, "label_draw": torch.ones(len(filled))}), len(chosen)

    def pieces(self, first_batch: int) -> Iterator[Batch]:
        """Piece after piece, without end, read ahead where the configuration has workers.

        Raises:
            RuntimeError: when a worker dies.
        """
        steps = self._config.processes.accumulation_steps
        keys = _Keys(first_batch, steps)
        workers = self._config.processes.data_workers
        if workers == 0:
            yield from map(self.__getitem__, keys)
            return
        loader = torch.utils.data.DataLoader(
            cast(Any, self), batch_size=None, sampler=cast(Any, keys), num_workers=workers, prefetch_factor=2,
            pin_memory=self._pins, worker_init_fn=_begin_worker,
            generator=torch.Generator(),                                        # not the global one: it is saved
        )
        try:
            yield from loader
        except RuntimeError as error:
            if not re.search("DataLoader worker.*(exited unexpectedly|killed by signal)", str(error), re.DOTALL):
                raise
            raise RuntimeError(
                f"a process that reads data has died ({str(error).splitlines()[0]}); most often the system had no "
                "memory left for it: fewer --processes.data-workers help. The run resumes from its last checkpoint"
            ) from error


class _Keys:
    """(batch, piece) of a run from one batch on, without end."""

    def __init__(self, first_batch: int, pieces: int):
        self._first_batch, self._pieces = first_batch, pieces

    def __iter__(self) -> Iterator[tuple[int, int]]:
        number = self._first_batch
        while True:
            yield from ((number, piece) for piece in range(self._pieces))
            number += 1


def _begin_worker(index: int) -> None:
    ignore_in_worker()
