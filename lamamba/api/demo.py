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
from lamamba.models.unet import LaMambaUNet
from lamamba.options.base import verb
from lamamba.options.demo import SHOWN_PER_DIGIT, DemoOptions
from lamamba.options.training import TrainOptions
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import FEW_STEPS, open_network
from lamamba.sampling import generate
from lamamba.utils.files import write_atomically, write_json
from lamamba.utils.progress import Progress, ProgressOption, Report, reporting
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
    seconds = {"training": time.perf_counter() - began}
    sampling, real = recipe.sampling, digits.images.transpose(0, 2, 3, 1)
    with reporting(progress) as report:
        samples, labels, seconds["sampling"] = _sample(
            training.state.ema, sampling.guidance, sampling.steps, options.per_digit, report)
    network, metadata = open_network(FEW_STEPS)                                 # to train one takes half an hour
    few, few_labels, seconds["one_step"] = _sample(network, metadata.guidance, 1, SHOWN_PER_DIGIT)
    _draw(out / "digits.png", samples, labels)
    _draw(out / "real.png", real, digits.labels)
    _draw(out / "one-step.png", few, few_labels)
    run_curves({RECIPE: read_metrics(out / "run" / "metrics.jsonl")}, out / "loss.png")
    score = score_digits(samples, labels, real, digits.labels)
    seconds["all"] = time.perf_counter() - began
    result = DemoResult(out, score, seconds, training, samples, labels)
    figures = {"asked" if name == "num_samples" else name: value for name, value in asdict(score).items()}
    values = {"score": figures, "seconds": seconds, "config": recipe.config.to_dict()}
    write_json(out / "report.json", values)
    write_atomically(out / "report.md", _report(result.summary, training.step, recipe.seed))
    return result


def _sample(
    network: LaMambaUNet, guidance: float | None, steps: int | None, per_digit: int,
    report: Report = lambda progress: None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Images (10 per_digit, h, w, 1) of all digits, which digits they are to be, and the seconds that they took."""
    labels, began = np.repeat(np.arange(10), per_digit), time.perf_counter()
    scale = default_guidance(guidance, network.architecture.num_classes)
    logger.info(f"sampling {len(labels)} digits: {counted(steps or 0, 'step')}, guidance {scale:g}")
    samples = generate(
        network, labels.tolist(), range(FIRST_SEED, FIRST_SEED + len(labels)), num_steps=steps, guidance=scale,
        batch_size=100, on_step=lambda done, total: report(Progress("sampling", done, total, unit="steps")),
    )
    return samples, labels, time.perf_counter() - began


def _draw(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """A row of the first images of each digit."""
    shown = np.concatenate([np.flatnonzero(labels == digit)[:SHOWN_PER_DIGIT] for digit in range(10)])
    save_picture(grid_picture(images[shown], SHOWN_PER_DIGIT, Digits.label_names), path)


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
