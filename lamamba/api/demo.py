"""lamamba.demo: train on handwritten digits, sample, evaluate the samples, and write a report."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from lamamba.api.train import TrainResult, train
from lamamba.data.digits import Digits
from lamamba.metrics.digits import DigitScore, score_digits
from lamamba.options.base import verb
from lamamba.options.demo import SHOWN_PER_DIGIT, DemoOptions
from lamamba.options.training import TrainOptions
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import FEW_STEPS, open_network
from lamamba.sampling import generate
from lamamba.utils.files import write_atomically, write_json
from lamamba.utils.progress import Progress, ProgressOption, reporting
from lamamba.utils.text import counted
from lamamba.viz.curves import read_metrics, run_curves
from lamamba.viz.grids import grid_picture, save_picture

logger = logging.getLogger("lamamba.api")

RECIPE = "digits"
FIRST_SEED = 10_000


@dataclass(frozen=True)
class DemoResult:
    """A folder with digits.png, real.png, loss.png, one-step.png, report.md, report.json and the run."""

    folder: Path
    score: DigitScore
    """Of the samples, beside real digits."""
    seconds: dict[str, float]
    """"training", "sampling", "one_step" (100 images by one evaluation each) and "all"."""
    training: TrainResult = field(repr=False)
    samples: np.ndarray = field(repr=False)
    """(10 per_digit, h, w, 1) uint8."""
    labels: np.ndarray = field(repr=False)
    """(10 per_digit,) requested digits."""

    @property
    def summary(self) -> str:
        """The figures as text."""
        score, seconds = self.score, self.seconds
        return f"""\
recognised as requested   {score.recognised} of {score.num_samples} ({score.recognised / score.num_samples:.1%})
classifier, real digits   {score.held_out_accuracy:.1%} right (held out)
two of a class differ     {score.spread:.2f} on average, real ones {score.real_spread:.2f}: {score.spread_share:.0%}
nearest real digit        {score.nearest_to_real:.2f} away (median); from real to real {score.real_to_real:.2f}
time                      {seconds['training']:.0f} s training, {seconds['sampling']:.0f} s sampling, \
{seconds['all']:.0f} s in all
100 in one step each      {seconds['one_step']:.2f} s, by the flow map of the package ({FEW_STEPS})"""

    def __str__(self) -> str:
        out = self.folder
        return f"""
{self.summary}

pictures and report: {out.resolve()}
  open {out / 'digits.png'}
more: lamamba sample {out / 'run'} --classes 3,7 --seed 0 --out grid.png"""

    def _repr_png_(self) -> bytes:
        return (self.folder / "digits.png").read_bytes()


@verb
def demo(options: DemoOptions | None = None, *, progress: ProgressOption = "auto") -> DemoResult:
    """Train on 1,797 real handwritten digits, sample digits, and write pictures and a report.

    A run that was stopped in the folder is resumed.

    Raises:
        OSError, ValueError: when the folder holds something else, or the disk is full.
        Interrupted: when a signal stopped the training, after a checkpoint.
    """
    options = options or DemoOptions()
    out = options.out
    recipe = TrainOptions.from_recipe(RECIPE, out=out / "run", seed=options.seed)
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    began = time.perf_counter()
    digits = Digits(recipe.data.image_size)
    training = train(recipe, data=digits, progress=progress)
    trained = time.perf_counter()
    labels = np.repeat(np.arange(10), options.per_digit)
    samples = _sample(training, recipe, labels, progress)
    sampled = time.perf_counter()
    _draw(out, samples, labels, digits)
    one_step = _draw_in_one_step(out, digits)
    score = score_digits(samples, labels, digits.images.transpose(0, 2, 3, 1), digits.labels)
    seconds = {"training": trained - began, "sampling": sampled - trained, "one_step": one_step,
               "all": time.perf_counter() - began}
    result = DemoResult(out, score, seconds, training, samples, labels)
    figures = {"asked" if name == "num_samples" else name: value for name, value in asdict(score).items()}
    values = {"score": figures, "seconds": seconds, "config": recipe.config.to_dict()}
    write_json(out / "report.json", values)
    write_atomically(out / "report.md", _report(result.summary, training.step, recipe.seed))
    return result


def _sample(training: TrainResult, recipe: TrainOptions, labels: np.ndarray, progress: ProgressOption) -> np.ndarray:
    sampling, network = recipe.sampling, training.state.ema
    guidance = default_guidance(sampling.guidance, network.architecture.num_classes)
    logger.info(f"sampling {len(labels)} digits: {counted(sampling.steps or 0, 'step')}, guidance {guidance:g}")
    with reporting(progress) as report:
        return generate(
            network, labels.tolist(), range(FIRST_SEED, FIRST_SEED + len(labels)), sampler=sampling.sampler,
            num_steps=sampling.steps, guidance=guidance, batch_size=100,
            on_step=lambda done, total: report(Progress("sampling", done, total, unit="steps")),
        )


def _draw(out: Path, samples: np.ndarray, labels: np.ndarray, digits: Digits) -> None:
    """Write digits.png, real.png and loss.png."""
    real = digits.images.transpose(0, 2, 3, 1)
    for name, images, classes in (("digits", samples, labels), ("real", real, digits.labels)):
        shown = np.concatenate([np.flatnonzero(classes == digit)[:SHOWN_PER_DIGIT] for digit in range(10)])
        save_picture(grid_picture(images[shown], SHOWN_PER_DIGIT, list(digits.label_names)), out / f"{name}.png")
    run_curves({RECIPE: read_metrics(out / "run" / "metrics.jsonl")}, out / "loss.png")


def _draw_in_one_step(out: Path, digits: Digits) -> float:
    """Write one-step.png, guided digits of one evaluation each by the package's flow map; returns its seconds."""
    network, metadata = open_network(FEW_STEPS)                                 # to train one takes half an hour
    labels = np.repeat(np.arange(10), SHOWN_PER_DIGIT).tolist()
    began = time.perf_counter()
    samples = generate(
        network, labels, range(FIRST_SEED, FIRST_SEED + len(labels)), num_steps=1, batch_size=100,
        guidance=default_guidance(metadata.guidance, network.architecture.num_classes),
    )
    seconds = time.perf_counter() - began
    save_picture(grid_picture(samples, SHOWN_PER_DIGIT, list(digits.label_names)), out / "one-step.png")
    return seconds


def _report(summary: str, steps: int, seed: int) -> str:
    return f"""# LaMamba-Diff on handwritten digits

Trained from scratch for {counted(steps, 'step')} (seed {seed}) on 1,797 real digits of 8 x 8 pixels, enlarged below.

```
{summary}
```

The classifier is a support vector machine trained on real digits. Distances are Euclidean, pixels in [0, 1]. Samples
that lie much nearer to real digits than those to each other would be copies; much less spread than real ones would be
collapse.

Requested: 0 to 9, one row each:

![samples](digits.png)

Real digits:

![real digits](real.png)

![loss](loss.png)

Not by this run, but by the flow map that comes with the package, which guides and draws with one evaluation of the
network for each image (docs/few-steps.md; `lamamba train digits_few_steps` makes such a network of a flow):

![one evaluation each](one-step.png)
"""
