"""Who watches the training: a live line for people, sample grids for eyes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lamamba.data.codec import Decoder
from lamamba.options.training import SamplingOptions
from lamamba.sampling import generate
from lamamba.training.loop import StepState
from lamamba.viz.grids import grid_picture, save_picture

MAX_GRID_CLASSES = 10
FACTS_WIDTH = 58
"""Characters of a terminal's line that loss, norm, speed, memory and time left take."""
PLAIN_LINES = 20
"""Lines that a run prints where nobody watches a terminal."""


class ProgressLine:
    """A bar with loss, gradient norm, speed, memory and time left on a terminal; plain lines in a file."""

    def __init__(self, steps: int, first_step: int = 0):
        self._steps, self._first_step = steps, first_step
        self._console = Console()
        self._live = self._console.is_terminal
        room = self._console.width - FACTS_WIDTH - len(f" {steps}/{steps} ")
        self._bar = Progress(
            BarColumn(bar_width=min(40, max(4, room))), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(), console=self._console,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first_step, facts="")
        self._smooth: float | None = None

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def __call__(self, moment: StepState) -> None:
        self._smooth = moment.loss if self._smooth is None else 0.95 * self._smooth + 0.05 * moment.loss
        norm, rate = f"{moment.grad_norm:.3g}", f"{moment.images_per_second:.0f} images/s"
        memory = f"{moment.peak_memory / 2**30:.1f} GiB"
        facts = f"loss {self._smooth:.4f}  gradient norm {norm}  {rate}  {memory}"
        if self._live:
            self._bar.update(
                self._task, completed=moment.step, facts=f"loss {self._smooth:.4f}  grad {norm}  {rate}  {memory}"
            )
        elif moment.step % max(1, self._steps // PLAIN_LINES) == 0 or moment.step == self._steps:
            left = moment.seconds / max(1, moment.step - self._first_step) * (self._steps - moment.step)
            print(
                f"step {moment.step}/{self._steps}  {facts}  {moment.seconds:.0f} s, {left:.0f} s left", flush=True
            )


class SampleGrid:
    """Every so often a picture from the averaged weights, always of the same seeds and labels."""

    def __init__(
        self, options: SamplingOptions, folder: Path, label_names: tuple[str, ...], decoder: Decoder | None = None
    ):
        self._options, self._folder, self._decoder = options, folder, decoder
        self._names = label_names[:MAX_GRID_CLASSES]

    def __call__(self, moment: StepState) -> None:
        options = self._options
        if not options.every or (moment.step % options.every and moment.step != moment.steps):
            return
        network = moment.whole_ema()
        if network is None:                                                     # the main process draws
            return
        rows = max(1, len(self._names))
        labels = [row for row in range(rows) for _ in range(options.per_class)] if self._names else None
        images = generate(
            network, labels, range(rows * options.per_class), sampler=options.sampler,
            num_steps=options.num_steps, guidance=options.guidance if self._names else 1.0,
            decoder=self._decoder,
        )
        picture = grid_picture(images, options.per_class, self._names)
        save_picture(picture, self._folder / f"step_{moment.step:08d}.png")


class StepBar:
    """A bar over sampling steps, on a terminal only."""

    def __init__(self, text: str):
        self._bar = Progress(
            TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True,
        )
        self._task = self._bar.add_task(text, total=None)

    def __enter__(self) -> StepBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
