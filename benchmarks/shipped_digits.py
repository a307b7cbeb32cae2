"""Write a model that comes with the package from a run, and measure it.

    lamamba train digits_small --out runs/digits_small
    python benchmarks/shipped_digits.py --write runs/digits_small         # the run's averaged weights, in bfloat16
    python benchmarks/shipped_digits.py                                   # the figures of what is in the package

    lamamba train digits_few_steps --out runs/digits_few_steps
    python benchmarks/shipped_digits.py --model shipped-few-steps --write runs/digits_few_steps

The classifier is the demo's: a support vector machine trained on real digits.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from lamamba.data.digits import Digits
from lamamba.diffusion.denoise import samplers_for
from lamamba.metrics.digits import score_digits
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import load_recipe
from lamamba.pretrained import SHIPPED_MODELS, shipped_model
from lamamba.runs.model import open_network
from lamamba.sampling import generate

RECIPES = {"shipped": "digits_small", "shipped-few-steps": "digits_few_steps"}
FIRST_SEED = 10_000


def write(run: Path, folder: Path) -> None:
    """The averaged weights of a run's newest checkpoint into the package, rounded to bfloat16."""
    model, facts = open_network(run)
    fresh = LaMambaUNet(model.architecture)                                     # one that does not know where it lay
    fresh.load_state_dict(model.state_dict())
    fresh.bfloat16().save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").chmod(0o644)
    facts.save(folder / "sampling.json")


def measure(name: str, per_digit: int, guidance: float | None) -> str:
    """The figures of a model in the package, as a table."""
    folder = shipped_model(name)
    model, _ = open_network(folder)
    digits, sampling = Digits(), load_recipe(RECIPES[name]).sampling
    guidance = sampling.guidance if guidance is None else guidance
    asked = np.repeat(np.arange(10), per_digit)
    began = time.perf_counter()
    samples = generate(
        model, asked.tolist(), range(FIRST_SEED, FIRST_SEED + len(asked)), sampler=sampling.sampler,
        num_steps=sampling.steps, guidance=guidance, batch_size=100,
    )
    seconds = time.perf_counter() - began
    score = score_digits(samples, asked, digits.images.transpose(0, 2, 3, 1), digits.labels)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    sampler = sampling.sampler or samplers_for(model.architecture.objective)[0]
    return f"""\
parameters              {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M, {size:.2f} MB on disk
sampling                {sampler}, {sampling.steps} steps, guidance {guidance:g}; {seconds:.1f} s
recognised as asked     {score.recognised} of {score.num_samples} ({score.recognised / score.num_samples:.1%})
classifier's accuracy   {score.held_out_accuracy:.1%} on real digits (held out)
two of a class differ   {score.spread:.2f} on average, real ones {score.real_spread:.2f}: {score.spread_share:.0%}
nearest real digit      {score.nearest_to_real:.2f} away (median); from real to real {score.real_to_real:.2f}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHIPPED_MODELS, default="shipped")
    parser.add_argument("--write", type=Path, metavar="RUN", help="first put this run's weights into the package")
    parser.add_argument("--per-digit", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="by default the recipe's")
    options = parser.parse_args()
    if options.write:
        import lamamba.pretrained

        write(options.write, Path(lamamba.pretrained.__file__).parent / SHIPPED_MODELS[options.model])
    print(measure(options.model, options.per_digit, options.guidance))
