"""What the page does, without the page: settings become pictures, step by step. No gradio here."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lamamba.config import unknown_name
from lamamba.data.codec import LatentDecoder, PixelCodec
from lamamba.diffusion.denoise import SAMPLERS, samplers_for
from lamamba.diffusion.guidance import Guidance
from lamamba.models.unet import LaMambaUNet
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import fingerprint
from lamamba.sampling import generate
from lamamba.sampling.settings import ImageMetadata, Settings

MAX_IMAGES = 100
"""In one request: a page is for looking; many images are for lamamba sample."""
MAX_GUIDANCE = 20.0
MAX_SEED = 2**32 - 1
"""What fits a number field of a browser; the command line takes larger ones."""
BATCH_TOKENS = 16_384
"""Of the images that the network sees at once: 100 digits, 16 pictures of 256 pixels."""
PAPER = 235
"""Grey of images that have not been begun."""
THREAD_NAME = "lamamba drawing"
FRAMES_PER_SECOND = 12
"""Intermediate pictures that are sent at most: eyes and connections need no more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks for."""

    classes: tuple[str, ...] = ()
    """Names, one row each; none for an unconditional model."""
    num: int = 8
    """Images of each class, or in all."""
    seed: int = 0
    """Of the first image; the others follow."""
    sampler: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    height: int | None = None
    width: int | None = None
    """Pixels; by default what the network was made for."""


@dataclass(frozen=True)
class Frame:
    """A moment of the drawing."""

    images: np.ndarray
    """(n, h, w, c) uint8: the clean images as the network sees them now; at the end, the images."""
    done: int
    total: int
    """Steps."""
    is_last: bool
    seconds: float
    """Since the drawing began."""


class Session:
    """One network and its facts, drawing for one caller at a time."""

    def __init__(
        self, model: LaMambaUNet, facts: ModelMetadata, *, name: str, source: str, decoder: LatentDecoder | None = None
    ):
        """
        Args:
            model: on the device and in the precision it is to run in.
            facts: of the model: names of its classes, kind of its images.
            name: for the page's heading.
            source: how the pictures' settings name it, for lamamba sample to find it again.
            decoder: of latents; None for a model of pixels.
        """
        self.model, self.facts, self.name, self.source = model, facts, name, source
        self._decoder, self._turn = decoder, threading.Lock()
        config = model.architecture
        named = len(facts.label_names) == config.num_classes
        self.class_names = tuple(facts.label_names) if named else tuple(map(str, range(config.num_classes)))
        self.samplers = samplers_for(config.objective)
        self.pixel = max(1, facts.image_size // config.input_size[0]) if decoder else 1
        """Pixels of the picture for each of the network's own: 1, or a latent's."""
        self.side_step = 4 * config.patch_size * self.pixel
        """Sides are multiples of it."""
        self.size = (config.input_size[0] * self.pixel, config.input_size[1] * self.pixel)
        """Height and width that the network was made for."""
        self.max_side = 4 * max(self.size)
        self.channels = config.in_channels if decoder is None else 3
        self._fingerprint = fingerprint(model)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def check(self, request: Request) -> None:
        """Refuse what cannot be drawn, before anything is.

        Raises:
            ValueError: with what came, what fits, and what to do.
        """
        config = self.model.architecture
        if config.num_classes and not request.classes:
            raise ValueError("no class is chosen: pick at least one")
        for name in request.classes:
            if name not in self.class_names:
                raise unknown_name("class", name, self.class_names)
        _check_whole("the number of images", request.num, 1, MAX_IMAGES)
        _check_whole("the seed", request.seed, 0, MAX_SEED)
        if (count := request.num * max(1, len(request.classes))) > MAX_IMAGES:
            raise ValueError(
                f"{len(request.classes)} classes with {request.num} pictures each are {count}; this page draws up to "
                f"{MAX_IMAGES} at once: choose fewer of either (lamamba sample makes any number)"
            )
        sampler = request.sampler or self.samplers[0]
        if sampler not in self.samplers:
            raise unknown_name("sampler for this model", sampler, self.samplers)
        if request.steps is not None:
            _check_whole(
                "the number of steps", request.steps, SAMPLERS[sampler].min_steps, SAMPLERS[sampler].max_steps)
        if not isinstance(request.guidance, int | float) or not 0 <= request.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance {request.guidance!r} must be a number from 0 to {MAX_GUIDANCE}; 1 is none")
        if not config.num_classes and request.guidance != 1:
            raise ValueError(f"guidance {request.guidance:g} needs classes; this model has none: use 1")
        for what, side in (("height", request.height), ("width", request.width)):
            if side is not None:
                _check_whole(f"the {what}", side, self.side_step, self.max_side)
        config.fit_input(request.height, request.width, self.pixel)

    def draw(self, request: Request) -> Iterator[Frame]:
        """The drawing as it comes to be: some moments on the way, then the images.

        Closing the iterator stops the drawing after the step it is in.

        Raises:
            ValueError: as check does, before the first frame.
        """
        self.check(request)
        frames: queue.Queue[Frame | BaseException] = queue.Queue()
        is_watched = threading.Event()
        is_watched.set()
        worker = threading.Thread(
            target=self._work, args=(request, frames, is_watched), name=THREAD_NAME, daemon=True
        )
        worker.start()
        try:
            while True:
                frame = frames.get()
                if isinstance(frame, BaseException):
                    raise frame
                yield frame
                if frame.is_last:
                    return
        finally:
            is_watched.clear()
            worker.join()

    def facts_of(self, request: Request) -> ImageMetadata:
        """All that repeats the drawing, for the PNG's metadata."""
        height, width = self.size_of(request)
        sampler = request.sampler or self.samplers[0]
        count = self._count(request)
        autoencoder = self._decoder.autoencoder if self._decoder else None
        settings = Settings(
            model=self.source, model_sha256=self._fingerprint, sampler=sampler,
            steps=request.steps or SAMPLERS[sampler].default_steps, height=height, width=width,
            guidance=Guidance(float(request.guidance)), autoencoder=autoencoder.name if autoencoder else None,
            autoencoder_sha256=autoencoder.sha256 if autoencoder else None,
            dtype=str(self.model.dtype).removeprefix("torch."),
        )
        labels = self._labels(request)
        return ImageMetadata(
            settings=settings, seeds=tuple(range(request.seed, request.seed + count)),
            labels=None if labels is None else tuple(labels), columns=self.columns_of(request),
            row_names=self.row_names_of(request), batch_size=self._batch_size(request),
        )

    def size_of(self, request: Request) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return request.height or self.size[0], request.width or self.size[1]

    def columns_of(self, request: Request) -> int:
        """Images side by side in the picture: a row for each class; those of a single one about in a square."""
        if len(request.classes) > 1:
            return request.num
        side = math.ceil(math.sqrt(request.num))
        return next((columns for columns in range(side, 2 * side) if request.num % columns == 0), side)

    def row_names_of(self, request: Request) -> tuple[str, ...]:
        """What stands to the left of the picture's rows."""
        return request.classes if len(request.classes) > 1 else ()

    def _labels(self, request: Request) -> list[int] | None:
        if not self.class_names:
            return None
        return [self.class_names.index(name) for name in request.classes for _ in range(request.num)]

    def _count(self, request: Request) -> int:
        return request.num * max(1, len(request.classes))

    def _batch_size(self, request: Request) -> int:
        height, width = self.size_of(request)
        tokens = height * width // (self.pixel * self.model.architecture.patch_size) ** 2
        return max(1, min(MAX_IMAGES, BATCH_TOKENS // tokens))

    def _work(self, request: Request, frames: queue.Queue[Frame | BaseException], is_watched: threading.Event) -> None:
        """Draw, in a thread of its own, and put frames, and at last what went wrong if it did, into the queue."""
        began, last_shown = time.perf_counter(), 0.0
        height, width = self.size_of(request)
        decoder = self._decoder or PixelCodec()
        shown = np.full((self._count(request), height, width, self.channels), PAPER, np.uint8)
        progress = (0, 1)

        def on_step(done: int, total: int) -> None:
            nonlocal progress
            if not is_watched.is_set():
                raise _Stopped
            progress = (done, total)

        def watch(batch: range, step: int, x0: Tensor) -> None:
            nonlocal last_shown
            now = time.perf_counter()
            if progress[0] > 1 and now - last_shown < 1 / FRAMES_PER_SECOND:
                return
            shown[batch.start : batch.stop] = decoder.decode(x0)
            last_shown = time.perf_counter()
            # decoding latents takes its time: no more than a third of the whole
            last_shown += 2 * (last_shown - now)
            frames.put(Frame(shown.copy(), *progress, False, last_shown - began))

        try:
            with self._turn:
                images = generate(
                    self.model, self._labels(request), range(request.seed, request.seed + len(shown)),
                    sampler=request.sampler, num_steps=request.steps, guidance=float(request.guidance),
                    input_size=(height // self.pixel, width // self.pixel), batch_size=self._batch_size(request),
                    decoder=self._decoder, on_step=on_step, watch=watch,
                )
            frames.put(Frame(images, progress[1], progress[1], True, time.perf_counter() - began))
        except BaseException as error:                                          # raised again where it is waited for
            frames.put(error)


class _Stopped(Exception):
    """Whoever asked does not look any more."""


def _check_whole(what: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{what} is {value!r}; it must be a whole number from {least} to {most:,}".replace(",", " "))
