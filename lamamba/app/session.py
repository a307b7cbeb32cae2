"""Sampling for the page, without the page: settings become images, step by step. No gradio here."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lamamba.config import check_known
from lamamba.diffusion.denoise import SAMPLERS, samplers_for
from lamamba.options.sampling import SamplerOptions
from lamamba.pretrained import DESCRIPTION
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import Model, base_of_lora, move, open_model
from lamamba.sampling import generate
from lamamba.sampling.prepare import resolve_settings
from lamamba.sampling.settings import ImageMetadata, Settings
from lamamba.sampling.table import find_labels
from lamamba.utils.distributed import pick_device
from lamamba.utils.text import shown

MAX_IMAGES = 100
"""In one request; lamamba sample makes any number."""
MAX_GUIDANCE = 20.0
MAX_CACHE = 10
"""Longest interval of the cache."""
MAX_SEED = 2**32 - 1
"""What fits a number field of a browser; the command line takes larger ones."""
BATCH_TOKENS = 16_384
"""Tokens of a batch: 100 digits, or 16 images of 256 pixels."""
BLANK = 235
"""Grey level of images whose batch has not begun."""
THREAD_NAME = "lamamba app: sampling"
FRAMES_PER_SECOND = 12
"""Of intermediate images, at most."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of one sampling run."""

    classes: tuple[str, ...] = ()
    """Names or numbers, one row each; none for an unconditional model."""
    num_images: int = 8
    """Of each class, or in all for an unconditional model."""
    seed: int = 0
    """Of the first image; the next ones follow."""
    sampler: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    height: int | None = None
    width: int | None = None
    """In pixels; by default the size of the training."""
    cache: int = 1
    """Compute all depths of the network in every so many evaluations only; 1: in all of them."""


@dataclass(frozen=True)
class Frame:
    """The images after some of the steps."""

    images: np.ndarray
    """(n, h, w, c) uint8: x0 as predicted in this step; in the last frame, the samples."""
    done: int
    total: int
    """Steps, of all batches."""
    is_last: bool
    seconds: float
    """Since sampling began."""


class Session:
    """One model that samples for one request at a time; others wait.

    Args:
        model: its network on its device, in the dtype it is to run in.
        title: for the page's heading.
    """

    def __init__(self, model: Model, title: str):
        self.model, self.title = model, title
        self._lock = threading.Lock()
        network, metadata = model.network, model.metadata
        config = network.architecture
        has_names = len(metadata.label_names) == config.num_classes
        self.class_names = tuple(metadata.label_names) if has_names else tuple(map(str, range(config.num_classes)))
        self.samplers = samplers_for(config.objective)
        self.default_guidance = default_guidance(metadata.guidance, config.num_classes)
        self.guidance_range = (0.0, MAX_GUIDANCE / 2) if config.objective != "flow-map" else (
            config.guidance_range or (1.0, 1.0))
        """Lowest and highest scale that the page offers."""
        self.side_multiple = 4 * config.patch_size * model.factor
        """Sides of images in pixels are multiples of it."""
        self.size = (config.input_size[0] * model.factor, config.input_size[1] * model.factor)
        """Height and width of the training's images in pixels."""
        self.max_side = 4 * max(self.size)
        self.channels = model.image_channels

    @property
    def device(self) -> str:
        return str(self.model.network.device)

    @property
    def num_parameters(self) -> int:
        return self.model.network.num_parameters()

    def check(self, request: Request) -> None:
        """Check a request before anything is sampled.

        Raises:
            ValueError: with what came, what fits, and what to do.
        """
        config = self.model.network.architecture
        if config.num_classes and not request.classes:
            raise ValueError("no class is chosen: pick at least one")
        _check_whole("the number of images", request.num_images, 1, MAX_IMAGES)
        self._labels(request)
        _check_whole("the seed", request.seed, 0, MAX_SEED)
        if (count := self._count(request)) > MAX_IMAGES:
            raise ValueError(
                f"{len(request.classes)} classes with {request.num_images} images each are {count}; this page makes up "
                f"to {MAX_IMAGES} at once: choose fewer of either (lamamba sample makes any number)"
            )
        sampler = self.samplers[0] if request.sampler is None else request.sampler
        check_known("sampler for this model", sampler, self.samplers)
        if request.steps is not None:
            kind = SAMPLERS[sampler]
            _check_whole("the number of steps", request.steps, kind.min_steps, kind.max_steps)
        _check_whole("the interval of full passes", request.cache, 1, MAX_CACHE)
        if type(request.guidance) not in (int, float) or not 0 <= request.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance {shown(request.guidance)} must be a number from 0 to {MAX_GUIDANCE}; 1 is none")
        if not config.num_classes and request.guidance != 1:
            raise ValueError(f"guidance {request.guidance:g} needs classes; this model has none: use 1")
        for side, pixels in (("height", request.height), ("width", request.width)):
            if pixels is not None:
                _check_whole(f"the {side}", pixels, self.side_multiple, self.max_side)
        self.settings_of(request)

    def sample(self, request: Request) -> Iterator[Frame]:
        """Sample images: frames on the way, at last the images. Closing the iterator stops after the current step.

        Raises:
            ValueError: see `check`; before the first frame.
        """
        self.check(request)
        frames: queue.Queue[Frame | BaseException] = queue.Queue()
        stopped = threading.Event()
        thread = threading.Thread(target=self._sample, args=(request, frames, stopped), name=THREAD_NAME, daemon=True)
        thread.start()
        try:
            while True:
                frame = frames.get()
                if isinstance(frame, BaseException):
                    raise frame
                yield frame
                if frame.is_last:
                    return
        finally:
            stopped.set()
            thread.join()

    def settings_of(self, request: Request) -> Settings:
        """The settings of the images.

        Raises:
            ValueError: when cache, guidance or size do not fit the model.
        """
        options = SamplerOptions(
            sampler=request.sampler, steps=request.steps, guidance=float(request.guidance), height=request.height,
            width=request.width, cache=None if request.cache == 1 else request.cache,
        )
        dtype = str(self.model.network.dtype).removeprefix("torch.")
        return replace(resolve_settings(options, self.model, None), dtype=dtype)

    def metadata_of(self, request: Request) -> ImageMetadata:
        """All that reproduces the images, for the PNG's metadata."""
        labels = self._labels(request)
        return ImageMetadata(
            settings=self.settings_of(request), seeds=tuple(range(request.seed, request.seed + self._count(request))),
            labels=None if labels is None else tuple(labels), columns=self.columns_of(request),
            row_names=self.row_names_of(request), batch_size=self._batch_size(request),
        )

    def columns_of(self, request: Request) -> int:
        """Columns of the grid: a row for each class; images of a single class in about a square."""
        if len(request.classes) > 1:
            return request.num_images
        side = math.ceil(math.sqrt(request.num_images))
        return next((columns for columns in range(side, 2 * side) if request.num_images % columns == 0), side)

    def row_names_of(self, request: Request) -> tuple[str, ...]:
        """Names to the left of the grid's rows."""
        labels = (self._labels(request) or [])[:: request.num_images]
        return tuple(self.class_names[label] for label in labels) if len(labels) > 1 else ()

    def _labels(self, request: Request) -> list[int] | None:
        if not self.class_names:
            return None
        labels = find_labels(request.classes, self.class_names, len(self.class_names))
        return [label for label in labels for _ in range(request.num_images)]

    def _count(self, request: Request) -> int:
        return request.num_images * max(1, len(request.classes))

    def _batch_size(self, request: Request) -> int:
        height, width = request.height or self.size[0], request.width or self.size[1]
        tokens = height * width // (self.model.factor * self.model.network.architecture.patch_size) ** 2
        return max(1, min(MAX_IMAGES, BATCH_TOKENS // tokens))

    def _sample(self, request: Request, frames: queue.Queue[Frame | BaseException], stopped: threading.Event) -> None:
        """Put frames into the queue, or the exception that ended sampling; the target of a thread."""
        began, last_frame, settings = time.perf_counter(), 0.0, self.settings_of(request)
        images = np.full((self._count(request), settings.height, settings.width, self.channels), BLANK, np.uint8)
        progress = (0, 1)

        def on_step(done: int, total: int) -> None:
            nonlocal progress
            if stopped.is_set():
                raise _Stopped
            progress = (done, total)

        def preview(batch: range, step: int, x0: Tensor) -> None:
            nonlocal last_frame
            now = time.perf_counter()
            if progress[0] > 1 and now - last_frame < 1 / FRAMES_PER_SECOND:
                return
            images[batch.start : batch.stop] = self.model.decode(x0)
            decoded = time.perf_counter()
            last_frame = decoded + 2 * (decoded - now)                          # decoding: a third of the time at most
            frames.put(Frame(images.copy(), *progress, False, decoded - began))

        try:
            with self._lock:
                samples = generate(
                    self.model.network, self._labels(request), range(request.seed, request.seed + len(images)),
                    sampler=settings.sampler, num_steps=settings.steps, guidance=settings.guidance,
                    input_size=self.model.fit(settings.height, settings.width)[0],
                    batch_size=self._batch_size(request), decode=self.model.decode, cache=settings.cache,
                    on_step=on_step, preview=preview,
                )
            frames.put(Frame(samples, progress[1], progress[1], True, time.perf_counter() - began))
        except BaseException as error:                                          # raised again by `sample`
            frames.put(error)


def open_session(path: Path | None, autoencoder: str | None, device_name: str, lora: Path | None = None) -> Session:
    """A session of the model in a folder, or of the one that comes with the package for None.

    Raises:
        OSError, ValueError: when there is no such model, autoencoder, LoRA or device, or they do not fit together.
        RuntimeError: without peft, where there is a LoRA.
    """
    if path is None and lora is not None:
        path = base_of_lora(lora)
    device = pick_device(device_name)
    model = open_model(path, autoencoder=autoencoder, device=device, lora=lora)
    move(model.network, device, torch.float32)
    shipped = f"{DESCRIPTION.capitalize()}, the model that comes with the package"
    title = shipped if path is None else str(path)
    return Session(model, title if lora is None else f"{title}, with the LoRA {lora}")


class _Stopped(Exception):
    """The iterator was closed."""


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        fits = f"a whole number from {least} to {most:,}".replace(",", " ")
        raise ValueError(f"{name} is {shown(value)}; it must be {fits}")
