r"""How good are few steps? Every sampler on the digits models, from 2 to 32 evaluations of the network.

    lamamba train digits_small --model.objective noise --sampling.sampler ddim --steps 2000 --out runs/digits_noise
    python benchmarks/few_steps.py --noise-model runs/digits_noise --json benchmarks/results/few-steps.json \
        --picture docs/few-steps.png

The flow samplers draw with --flow-model (the model that comes with the package), the others with --noise-model; without
one, a smaller noise model is trained for a minute first, whose numbers are worse throughout. No guidance: a step costs
one evaluation (two with heun). Two scores, over the same seeds for all samplers:

distance      Frechet distance between the pixels of the samples and of all 1,797 real digits, both taken for Gaussian
              (the formula of FID, on 64 pixels in [0, 1] instead of Inception's features), minus the floor: that of
              real digits, drawn as often with replacement. With 400 or 1,000 images most of a distance is this bias.
recognised    share that the classifier of lamamba/metrics/digits.py takes for the digit that was asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from lamamba import metrics
from lamamba.config import Objective
from lamamba.data.digits import Digits
from lamamba.diffusion.denoise import SAMPLERS, make_scheduler, samplers_for
from lamamba.metrics.digits import DigitClassifier
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import load_recipe
from lamamba.pretrained import shipped_model
from lamamba.runs.model import open_network
from lamamba.sampling import generate
from lamamba.training.loop import train
from lamamba.viz.curves import save_figure, tidy

EVALUATIONS = (2, 3, 4, 6, 8, 12, 16, 32)
SHOWN: tuple[Objective, ...] = ("noise", "flow")
FIRST_SEED = 50_000
TRAINING_STEPS = 400


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between two sets of rows (n, d), each taken for Gaussian."""
    return metrics.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def real_floor(real: np.ndarray, count: int, draws: int = 20) -> float:
    """Mean distance of `count` real digits, drawn with replacement, to all of them: the bias of so many images."""
    generator = np.random.default_rng(0)
    return float(np.mean([
        frechet_distance(real[generator.integers(len(real), size=count)], real) for _ in range(draws)
    ]))


def rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


def train_noise_model() -> LaMambaUNet:
    """A small one, quickly."""
    config = load_recipe("digits_small")
    config = dataclasses.replace(
        config, steps=TRAINING_STEPS, ema_decays=(0.98,), device="cpu", checkpoint_every=10**9,
        model=dataclasses.replace(config.model, objective="noise"),
        sampling=dataclasses.replace(config.sampling, every=0, sampler="ddim"),
    )
    with tempfile.TemporaryDirectory() as folder:
        return train(config, Digits(config.data.image_size), Path(folder) / "run", []).ema


def steps_for(sampler: str, objective: Objective, evaluations: int) -> int | None:
    """How many steps make so many evaluations; None where no number does."""
    for steps in range(SAMPLERS[sampler].min_steps, evaluations + 1):
        if len(make_scheduler(sampler, objective, steps).timesteps) == evaluations:
            return steps
    return None


def number_of(sampler: str, objective: Objective, evaluations: int) -> int | None:
    """So many evaluations, or one fewer where the sampler makes only odd numbers (heun); None for neither."""
    return next((n for n in (evaluations, evaluations - 1) if n and steps_for(sampler, objective, n)), None)


def measure(
    model: LaMambaUNet, sampler: str, labels: list[int], real: np.ndarray, classifier: DigitClassifier, most: int,
    floor: float,
) -> list[dict[str, float]]:
    """One sampler's scores."""
    lines = []
    objective = model.architecture.objective
    for evaluations in EVALUATIONS:
        wanted = number_of(sampler, objective, evaluations)
        if wanted is None or wanted > most or any(line["evaluations"] == wanted for line in lines):
            continue
        steps = steps_for(sampler, objective, wanted)
        began = time.perf_counter()
        images = generate(
            model, labels, range(FIRST_SEED, FIRST_SEED + len(labels)), sampler=sampler, num_steps=steps,
            batch_size=100,
        )
        lines.append({
            "evaluations": wanted, "steps": steps, "distance": frechet_distance(rows(images), real) - floor,
            "recognised": float((classifier.classify(images) == np.array(labels)).mean()),
            "seconds": time.perf_counter() - began,
        })
        print(f"{sampler:<12}{steps:>4} steps {wanted:>4} evaluations  distance {lines[-1]['distance']:8.4f}  "
              f"recognised {lines[-1]['recognised']:6.1%}  {lines[-1]['seconds']:5.1f} s", flush=True)
    return lines


def markdown(results: dict[str, list[dict[str, float]]], floor: float) -> str:
    """Two tables for each objective: a row for each sampler, a column for each number of evaluations."""
    text = []
    for objective in SHOWN:
        names = [name for name in samplers_for(objective) if name in results]
        for score, form in (("distance", "{:.3f}"), ("recognised", "{:.0%}")):
            text += [f"| {objective} model: {score} | " + " | ".join(map(str, EVALUATIONS)) + " |",
                     "|---" * (len(EVALUATIONS) + 1) + "|"]
            for name in names:
                by_number = {line["evaluations"]: line for line in results[name]}
                cells = [by_number.get(number_of(name, objective, n) or 0) for n in EVALUATIONS]
                shown = [form.format(cell[score]) if cell else "" for cell in cells]
                text.append(f"| `{name}` | " + " | ".join(shown) + " |")
            text.append("")
    return "\n".join(text) + f"\nsubtracted (real digits, drawn as often): {floor:.4f}\n"


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Distance over evaluations, a panel for each objective."""
    figure = Figure(figsize=(11, 4.6))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, objective in zip(panels, SHOWN, strict=True):
        names = [name for name in samplers_for(objective) if name in results]
        for name, marker in zip(names, "osD^vPX*", strict=False):
            lines = sorted(results[name], key=lambda line: line["evaluations"])
            axes.plot([line["evaluations"] for line in lines], [line["distance"] for line in lines],
                      marker=marker, markersize=5, label=name)
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the network per image", title=f"{objective} model")
        axes.set_xticks(EVALUATIONS, list(map(str, EVALUATIONS)))
        axes.minorticks_off()
        if names:
            axes.legend(frameon=False, fontsize=9)
    distances = [line["distance"] for lines in results.values() for line in lines if line["distance"] > 0]
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if tick > min(distances) / 2]
    panels[0].set_yticks(ticks, list(map(str, ticks)))
    panels[0].set_ylabel("Fréchet distance to real digits (pixels), less that of real ones")
    panels[0].set_ylim(min(distances) * 0.85, max(distances) * 1.2)
    tidy(panels)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flow-model", type=Path, help="by default the model that comes with the package")
    parser.add_argument("--noise-model", type=Path, help="by default one that is trained first, for a minute")
    parser.add_argument("--images", type=int, default=10_000, help="of each sampler and number of steps")
    parser.add_argument("--samplers", nargs="*", help="some only")
    parser.add_argument("--most", type=int, default=max(EVALUATIONS), help="evaluations")
    parser.add_argument("--json", type=Path, help="results; samplers that it has already are not measured again")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--markdown", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)

    digits = Digits(8)
    real, labels = rows(digits.images), [k % 10 for k in range(chosen.images)]
    classifier = DigitClassifier(digits.images, digits.labels)
    floor = real_floor(real, chosen.images)
    results: dict[str, list[dict[str, float]]] = {}
    if chosen.json and chosen.json.is_file():
        before = json.loads(chosen.json.read_text(encoding="utf-8"))
        results = before["samplers"] if before["images"] == chosen.images else {}
    for objective in SHOWN:
        names = [name for name in samplers_for(objective) if name not in results]
        names = [name for name in names if not chosen.samplers or name in chosen.samplers]
        if names and objective == "flow":
            model = open_network(chosen.flow_model or shipped_model())[0]
        elif names:
            model = open_network(chosen.noise_model)[0] if chosen.noise_model else train_noise_model()
        for name in names:
            results[name] = measure(model.eval(), name, labels, real, classifier, chosen.most, floor)
            if chosen.json:
                facts = {"images": chosen.images, "floor": floor, "samplers": results}
                chosen.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    text = markdown(results, floor)
    print(f"\n{text}")
    if chosen.markdown:
        chosen.markdown.write_text(text, encoding="utf-8")
    if chosen.picture:
        draw(results, chosen.picture)


if __name__ == "__main__":
    main()
