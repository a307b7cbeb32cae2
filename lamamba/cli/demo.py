"""lamamba demo: from nothing to a trained network and its pictures, before your eyes."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lamamba.cli.parse import parse
from lamamba.options.training import load_recipe

DESCRIPTION = """Train LaMamba-Diff on 1,797 real handwritten digits, then let it draw.

Writes into the folder: digits.png (a 10 x 10 grid, one row per digit asked for), real.png (real digits, to compare),
loss.png, report.md, report.json, and run/, which lamamba sample and lamamba train can go on with."""

RECIPE = "digits"
SHOWN_PER_DIGIT = 10
FIRST_SEED = 10_000


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    out: Path = Path("demo")
    """Folder for pictures, report and run. A run that was stopped there is resumed."""
    seed: int = 0
    """Of the training."""
    steps: int | None = None
    """Training steps; by default the recipe's. Fewer are quicker and worse."""
    per_digit: int = 50
    """Samples of each digit that the judge sees; the first ten are shown."""


def main(arguments: list[str]) -> None:
    chosen = parse(DemoArguments, arguments, "demo", DESCRIPTION)
    config = dataclasses.replace(load_recipe(RECIPE), seed=chosen.seed)
    if chosen.per_digit < SHOWN_PER_DIGIT:
        raise ValueError(f"--per-digit {chosen.per_digit} must be at least {SHOWN_PER_DIGIT}, which are shown")
    if chosen.steps is not None:
        config = dataclasses.replace(config, steps=chosen.steps)

    import numpy as np

    from lamamba.cli.callbacks import StepBar
    from lamamba.cli.train import run_training
    from lamamba.data.digits import Digits
    from lamamba.metrics.digits import score_digits
    from lamamba.sampling import generate
    from lamamba.viz.curves import read_metrics, run_curves
    from lamamba.viz.grids import grid_picture, save_picture

    began = time.perf_counter()
    digits, out = Digits(config.data.image_size), chosen.out
    state = run_training(config, digits, out / "run")
    trained = time.perf_counter()

    asked = np.repeat(np.arange(10), chosen.per_digit)
    sampling = config.sampling
    plan = f"{sampling.sampler}, {sampling.num_steps} steps, guidance {sampling.guidance:g}"
    print(f"sampling {len(asked)} digits: {plan}", flush=True)
    with StepBar("sampling") as bar:
        samples = generate(
            state.ema, asked.tolist(), range(FIRST_SEED, FIRST_SEED + len(asked)), sampler=sampling.sampler,
            num_steps=sampling.num_steps, guidance=sampling.guidance, batch_size=100, on_step=bar,
        )
    sampled = time.perf_counter()

    names = list(digits.label_names)
    first = np.concatenate([np.flatnonzero(asked == d)[:SHOWN_PER_DIGIT] for d in range(10)])
    save_picture(grid_picture(samples[first], SHOWN_PER_DIGIT, names), out / "digits.png")
    real_first = np.concatenate([np.flatnonzero(digits.labels == d)[:SHOWN_PER_DIGIT] for d in range(10)])
    real = digits.images.transpose(0, 2, 3, 1)
    save_picture(grid_picture(real[real_first], SHOWN_PER_DIGIT, names), out / "real.png")
    run_curves({RECIPE: read_metrics(out / "run" / "metrics.jsonl")}, out / "loss.png")

    score = score_digits(samples, asked, real, digits.labels)
    training, sampling_time, overall = trained - began, sampled - trained, time.perf_counter() - began
    seconds = {"training": training, "sampling": sampling_time, "all": overall}
    facts = {"score": asdict(score), "seconds": seconds, "config": config.to_dict()}
    (out / "report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    summary = f"""\
recognised as asked     {score.recognised} of {score.num_samples} ({score.recognised / score.num_samples:.1%})
judge on real digits    {score.held_out_accuracy:.1%} right (held out)
two of a class differ   {score.spread:.2f} on average, real ones {score.real_spread:.2f}: {score.spread_share:.0%}
nearest real digit      {score.nearest_to_real:.2f} away (median); from real to real {score.real_to_real:.2f}
time                    {training:.0f} s training, {sampling_time:.0f} s sampling, {overall:.0f} s in all"""
    (out / "report.md").write_text(_report(summary, config.steps, config.seed), encoding="utf-8")
    print(f"\n{summary}\n\npictures and report: {out.resolve()}\n  open {out / 'digits.png'}")
    print(f"more: lamamba sample {out / 'run'} --classes 3,7 --seed 0 --out grid.png")


def _report(summary: str, steps: int, seed: int) -> str:
    return f"""# LaMamba-Diff on handwritten digits

Trained from scratch for {steps} steps (seed {seed}) on 1,797 real digits of 8 x 8 pixels, enlarged below.

```
{summary}
```

The judge is a support vector machine trained on real digits. Distances are Euclidean, pixels in [0, 1]. Samples that
lie much nearer to real digits than those to each other would be copies; much less spread than real ones would be
collapse.

Asked for 0 to 9, one row each:

![samples](digits.png)

Real digits:

![real digits](real.png)

![loss](loss.png)
"""
