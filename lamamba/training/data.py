"""Batches of a training run, by their number: read in this process or ahead of it by workers."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lamamba.data.images import ImageSet
from lamamba.data.sets import PixelSet, TrainingSet, read_ahead
from lamamba.options.training import TrainConfig
from lamamba.training.distributed import Processes
from lamamba.training.draws import draw, image_indices, split_held_out
from lamamba.training.interrupt import ignore_stop_signals
from lamamba.utils.distributed import part

GPU_THREADS = 4
"""Threads that read ahead for a GPU, where the options give no number."""


def as_training_set(data: ImageSet | TrainingSet, config: TrainConfig) -> TrainingSet:
    """A training set as it is; an image set as pixels.

    Raises:
        TypeError: for anything else.
    """
    needed = ("name", "image_size", "channels", "label_names", "read")
    if lacking := [name for name in needed if not hasattr(data, name)]:
        raise TypeError(
            f"data of type {type(data).__name__} has no {lacking[0]}: give an image set or a training set, such as "
            "lamamba.data.images.Images, or leave it out for what options.data names"
        )
    if hasattr(data, "input_size"):
        return cast(TrainingSet, data)
    return PixelSet(cast(ImageSet, data), config.data.mirror)


@dataclass(frozen=True)
class Batch:
    """Samples and their random numbers."""

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
    flow_map: Tensor
    """(b, 6) uniform, for the times, the guidance scale and the x_t of a flow map."""

    def pin_memory(self) -> Batch:
        """In page-locked memory, for asynchronous copies to a GPU; DataLoader calls it by this name."""
        tensors = (self.x0, self.labels, self.time, self.label_draw, self.eps, self.flow_map)
        return Batch(self.indices, *(tensor.pin_memory() for tensor in tensors))


class TrainingData:
    """A rank's part of the batches of a run, each in `accumulation_steps` micro-batches, from any batch on.

    Batch k holds the samples at positions k batch_size .. (k + 1) batch_size - 1 of the run, at any world size.
    """

    def __init__(self, samples: TrainingSet, config: TrainConfig, processes: Processes):
        self._samples, self._config = samples, config                           # workers get a copy: nothing else
        self._rank, self._world_size = processes.rank, processes.world_size
        self._pins = processes.device.type == "cuda"
        self._shape = (samples.channels, samples.input_size, samples.input_size)
        self._trained, self._held_out = split_held_out(config.seed, len(samples), config.watch.held_out)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """Micro-batch `key[1]` of this rank's part of batch `key[0]`."""
        number, micro_batch = key
        size = self._config.batch_size
        mine = part(range(number * size, (number + 1) * size), self._rank, self._world_size)
        positions = part(mine, micro_batch, self._config.processes.accumulation_steps)
        return self._read(positions, self._trained[image_indices(self._config.seed, positions, len(self._trained))])

    def _pinned(self, key: tuple[int, int]) -> Batch:
        return self[key].pin_memory() if self._pins else self[key]

    def _read(self, positions: Sequence[int], indices: np.ndarray, *, held_out: bool = False) -> Batch:
        draws = draw(self._config.seed, positions, self._shape, latent=self._samples.draws_latents, held_out=held_out)
        x0, labels = self._samples.read(indices.tolist(), draws)
        return Batch(indices.tolist(), x0, labels, draws.time, draws.label, draws.eps, draws.flow_map)

    def held_out(self, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """This rank's part of the held-out images with their fixed numbers, and how many of each batch count.

        Their times are evenly spaced. Every rank has as many batches: a short one is padded.
        """
        count = len(self._held_out)
        mine = part(range(count), self._rank, self._world_size)
        rounds = math.ceil(math.ceil(count / self._world_size) / batch_size)
        for number in range(rounds):
            chosen = list(mine[number * batch_size : (number + 1) * batch_size])
            padded = chosen or [0]
            batch = self._read(padded, self._held_out[padded], held_out=True)
            times = (torch.tensor(padded, dtype=torch.float64) + 0.5) / count
            yield replace(batch, time=times, label_draw=torch.ones(len(padded))), len(chosen)

    @contextlib.contextmanager
    def micro_batches(self, first_batch: int) -> Iterator[Iterator[Batch]]:
        """Micro-batches without end, read ahead where the configuration has workers, which end with the context.

        Raises:
            RuntimeError: when a worker dies.
        """
        options = self._config.processes
        numbers, parts = itertools.count(first_batch), range(options.accumulation_steps)
        keys = ((number, micro_batch) for number in numbers for micro_batch in parts)
        if options.data_workers == 0:
            threads = GPU_THREADS * self._pins if options.data_threads is None else options.data_threads
            if threads:
                with contextlib.closing(read_ahead(self._pinned, keys, threads=threads)) as batches:
                    yield batches
            else:
                yield map(self.__getitem__, keys)
            return
        loader = torch.utils.data.DataLoader(
            cast(Any, _InWorker(self)), batch_size=None, sampler=cast(Any, keys), num_workers=options.data_workers,
            prefetch_factor=2, pin_memory=self._pins, worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),                                        # not the global one: it is saved
        )
        others = set(multiprocessing.active_children())
        received = _received(iter(loader))
        workers = set(multiprocessing.active_children()) - others
        try:
            yield received
        except BaseException as error:
            died = [worker.exitcode for worker in workers if worker.exitcode]
            traceback.clear_frames(error.__traceback__)                         # they keep the loader's iterator alive
            if not died or not isinstance(error, RuntimeError | OSError | EOFError):
                raise
            raise RuntimeError(
                f"a process that reads data has died (status {died[0]}; negative: by this signal); most often the "
                "system had no memory left for it: fewer processes.data_workers help. The run resumes from its last "
                "checkpoint"
            ) from error
        finally:
            received.close()                                                    # the iterator goes: it ends its workers
            for worker in workers:                                              # they ignore the SIGTERM of an exit
                worker.kill()


class _InWorker:
    """Data in a worker: errors that have a message for the user are results there, without the worker's traceback."""

    def __init__(self, data: TrainingData):
        self._data = data

    def __getitem__(self, key: tuple[int, int]) -> Batch | Exception:
        try:
            return self._data[key]
        except (ValueError, OSError, RuntimeError) as error:
            kind = next(kind for kind in (ValueError, OSError, RuntimeError) if isinstance(error, kind))
            return kind(str(error))                                             # can be pickled, whatever it was


def _received(results: Iterator[Batch | Exception]) -> Generator[Batch, None, None]:
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result
