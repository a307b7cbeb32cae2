r"""LaMamba beside DiT, and LaMamba with parts of it left out, at a scale that two CPU cores can repeat.

    python benchmarks/study.py --out study/                      # trains what is missing, then writes the table
    python benchmarks/study.py --out study/ --json benchmarks/results/study.json --picture docs/study.png

The data are scikit-learn's handwritten digits, enlarged to 16 x 16 pixels (bicubic), so that windows of 4 x 4 tokens
are local. Every network is trained on the same images in the same order with the same noise, times and dropped labels,
by the same objective (flow), optimizer, learning rates and average of the weights; a seed changes all of these and the
initial weights, too. DiT is diffusers' with one shared embedder, begun as DiT begins. Then each draws as many digits
as there are real ones, class by class alike, from the same noise, without guidance, and is scored by

    FD          Frechet distance to the real digits, in the features of the package's classifier of digits
    accuracy    share that the classifier takes for the digit that was asked for
    nearest     median distance to the nearest training image, over that of a real digit to its nearest other one:
                well below 1 would mean copies

The row "real digits" is one random half of them against the other, which no network can be asked to beat by much. Runs
go side by side, one thread each; each writes its result, and the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from lamamba._version import __version__
from lamamba.benchmarking.flops import count, operations
from lamamba.benchmarking.peers.dit import DiT, DiTSize
from lamamba.config import BRANCHES, UNetConfig
from lamamba.data.codec import to_pixels, to_uint8
from lamamba.data.digits import Digits
from lamamba.diffusion.denoise import denoise, make_scheduler
from lamamba.diffusion.guidance import drop_labels, guided
from lamamba.diffusion.loss import training_loss
from lamamba.diffusion.schedule import make_schedule
from lamamba.metrics import Statistics, frechet_distance
from lamamba.metrics.digits import nearest_distances
from lamamba.metrics.digits_network import NUM_FEATURES, DigitFeatures
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import OptimizerOptions, TrainConfig
from lamamba.training.checkpoint import update_ema
from lamamba.training.draws import draw, image_indices
from lamamba.utils.files import write_atomically
from lamamba.viz.grids import grid_picture, save_picture

SIDE, NUM_CLASSES, OBJECTIVE = 16, 10, "flow"
BASE = UNetConfig(
    width=16, num_heads=4, depths=(1, 1, 1, 1), bottleneck_depth=1, window_size=4, in_channels=1,
    num_classes=NUM_CLASSES, grid=SIDE, objective=OBJECTIVE,
)
TRAINING = TrainConfig(
    batch_size=32, steps=1200, ema_decays=(0.995,),
    optimizer=OptimizerOptions(learning_rate=2e-3, warmup_steps=50, cooldown_share=0.5, max_grad_norm=1.0),
)
SAMPLER, NUM_STEPS = "flow-euler", 20


def _without(branch: str) -> UNetConfig:
    assert branch in BRANCHES
    names = tuple(name for name in BASE.removable_names() if name.endswith(f".{branch}"))
    return dataclasses.replace(BASE, removed_blocks=names)


NETWORKS: dict[str, UNetConfig | DiTSize] = {
    "LaMamba": BASE,
    "DiT, as many multiply-adds": DiTSize(76, 4, 4),
    "DiT, as many parameters": DiTSize(96, 6, 6),
    "LaMamba, plain rows and columns (cross scan)": dataclasses.replace(BASE, scan="cross"),
    "LaMamba without window attention": _without("attention"),
    "LaMamba without scan": _without("scan"),
    "LaMamba, patch 2": dataclasses.replace(BASE, patch_size=2, grid=SIDE // 2),
    "LaMamba, patch 2, as many multiply-adds": dataclasses.replace(BASE, patch_size=2, grid=SIDE // 2, width=32),
}


def build(shape: UNetConfig | DiTSize) -> nn.Module:
    """A network to train: of a configuration, or a DiT of patch 2."""
    if isinstance(shape, UNetConfig):
        return LaMambaUNet(shape)
    network = DiT(shape, SIDE, in_channels=1, out_channels=1, num_classes=NUM_CLASSES)
    network.initialise()
    return network


def cost(shape: UNetConfig | DiTSize) -> tuple[float, float]:
    """(parameters, multiply-adds of products, convolutions, attention and scan for one image), in millions."""
    if isinstance(shape, UNetConfig):
        found = count(shape)
        return found.parameters / 1e6, (found.matrix + found.scan) / 1e6
    with torch.device("meta"):
        network = build(shape).to("meta")
        inputs = torch.empty(1, 1, SIDE, SIDE), torch.empty(1), torch.empty(1, dtype=torch.int64)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return trained / 1e6, operations(network, *inputs).matrix / 1e6


def enlarged_digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits (1797, 1, 16, 16) uint8 and their labels."""
    digits = Digits()
    pictures = [np.asarray(Image.fromarray(image[0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
                for image in digits.images]
    return np.stack(pictures)[:, None], digits.labels


def learn(network: nn.Module, images: np.ndarray, labels: np.ndarray, config: TrainConfig) -> tuple[nn.Module, float]:
    """Train as lamamba train does, on any network; its averaged copy, and the mean loss of the last tenth of the steps.

    images (n, 1, 16, 16) uint8, labels (n,).
    """
    schedule = make_schedule(OBJECTIVE)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    options, (decay,) = config.optimizer, config.ema_decays
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
    )
    clean, losses = to_pixels(images), []
    for step in range(config.steps):
        places = range(step * config.batch_size, (step + 1) * config.batch_size)
        indices, draws = image_indices(config.seed, places, len(images)), draw(config.seed, places, (1, SIDE, SIDE))
        x0, t = clean[indices], schedule.timestep(draws.time)
        xt = schedule.add_noise(x0, draws.eps, t)
        asked = drop_labels(torch.from_numpy(labels[indices]), draws.label, config.label_dropout, NUM_CLASSES)
        loss = training_loss(network(xt, t, asked), x0, xt, t, draws.eps, schedule).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), options.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimizer.step()
        update_ema(average, network, decay)
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(f"step {step + 1}/{config.steps}  loss {statistics.mean(losses[-50:]):.4f}", flush=True)
    return average, statistics.mean(losses[-max(1, config.steps // 10):])


@torch.no_grad()
def draw_digits(network: nn.Module, labels: np.ndarray, seed: int, batch_size: int = 256) -> np.ndarray:
    """Digits of the classes asked for, (n, 16, 16, 1) uint8; image k from noise that depends on seed and k alone."""
    pictures = []
    for start in range(0, len(labels), batch_size):
        chosen = torch.from_numpy(labels[start : start + batch_size])
        noise = draw(seed, range(start, start + len(chosen)), (1, SIDE, SIDE), held_out=True).eps
        predict = guided(network, chosen, 1.0, NUM_CLASSES)
        x0 = denoise(predict, make_scheduler(SAMPLER, OBJECTIVE, NUM_STEPS), noise)
        pictures.append(to_uint8(x0))
    return np.concatenate(pictures)


def score(pictures: np.ndarray, labels: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Of pictures (n, 16, 16, 1) that were asked to show labels (n,), beside real ones of the same layout."""
    network, found = DigitFeatures(), []
    outputs = [network(images) for images in (pictures, real)]
    for output in outputs:
        of_all = Statistics(NUM_FEATURES).add(output["features"])
        found += [of_all.mean, of_all.covariance()]
    others = np.median(nearest_distances(real, real, same_set=True))
    return {
        "frechet": frechet_distance(*found),
        "accuracy": float((outputs[0]["logits"].argmax(axis=1) == labels).mean()),
        "nearest": float(np.median(nearest_distances(pictures, real)) / others),
    }


def real_halves(seed: int) -> dict[str, float]:
    """One random half of the real digits as if it had been drawn, against the other half."""
    images, labels = enlarged_digits()
    order, pictures = np.random.default_rng(seed).permutation(len(labels)), images.transpose(0, 2, 3, 1)
    half, other = order[: len(order) // 2], order[len(order) // 2 :]
    return score(pictures[half], labels[half], pictures[other])


def do_run(name: str, seed: int, path: Path, steps: int) -> None:
    """One network and seed, in this process: train, draw, score, write."""
    torch.set_num_threads(1)
    config = dataclasses.replace(TRAINING, seed=seed, steps=steps)
    images, labels = enlarged_digits()
    torch.manual_seed(seed)
    average, loss = learn(build(NETWORKS[name]), images, labels, config)
    pictures = draw_digits(average, labels, seed)
    result = {
        "network": name, "seed": seed, "steps": steps, "loss": loss,
        **score(pictures, labels, images.transpose(0, 2, 3, 1)),
    }
    first = [int(np.flatnonzero(labels == digit)[k]) for k in range(2) for digit in range(NUM_CLASSES)]
    np.save(path.with_suffix(".npy"), pictures[first])
    write_atomically(path, json.dumps(result, indent=2) + "\n")


def draw_networks(folder: Path, names: Sequence[str], seed: int, path: Path) -> None:
    """A row for each network: the first two of every digit, from the same noise everywhere."""
    digits = np.concatenate([np.load(result_path(folder, name, seed).with_suffix(".npy")) for name in names])
    save_picture(grid_picture(digits, 2 * NUM_CLASSES, names, cell_pixels=32), path)


def result_path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{list(NETWORKS).index(name)}-{seed}.json"


def do_all(folder: Path, seeds: Sequence[int], names: Sequence[str], steps: int, side_by_side: int) -> None:
    """Every run that has no result yet, each in a process of its own."""
    waiting = [(name, seed) for seed in seeds for name in names if not result_path(folder, name, seed).is_file()]
    total, working = len(waiting), dict[subprocess.Popen[bytes], tuple[str, int, float]]()
    while waiting or working:
        while waiting and len(working) < side_by_side:
            name, seed = waiting.pop(0)
            path = result_path(folder, name, seed)
            command = [sys.executable, __file__, "--run", name, "--seeds", str(seed), "--steps", str(steps),
                       "--out", str(folder)]
            with path.with_suffix(".log").open("wb") as log:
                process = subprocess.Popen(
                    command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
                )
            working[process] = name, seed, time.perf_counter()
        time.sleep(0.2)
        for process in [process for process in working if process.poll() is not None]:
            name, seed, began = working.pop(process)
            path = result_path(folder, name, seed)
            if not path.is_file():
                for other in working:
                    other.terminate()
                sys.exit(f"{name}, seed {seed} failed; see {path.with_suffix('.log')}")
            done = total - len(waiting) - len(working)
            found = json.loads(path.read_text(encoding="utf-8"))
            print(f"{done}/{total}  {name}, seed {seed}: FD {found['frechet']:.2f}, accuracy {found['accuracy']:.1%}, "
                  f"{time.perf_counter() - began:.0f} s", flush=True)


def summary(folder: Path, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure, by network."""
    rows: dict[str, Any] = {}
    for name in names:
        runs = [json.loads(result_path(folder, name, seed).read_text(encoding="utf-8")) for seed in seeds]
        parameters, multiply_adds = cost(NETWORKS[name])
        rows[name] = {"parameters_M": round(parameters, 3), "multiply_adds_M": round(multiply_adds, 2), "runs": runs}
    rows["real digits"] = {"parameters_M": None, "multiply_adds_M": None, "runs": [real_halves(seed) for seed in seeds]}
    return rows


def table(rows: dict[str, Any]) -> str:
    """The summary as Markdown."""
    def figure(runs: list[dict[str, float]], name: str, digits: int, scale: float = 1) -> str:
        values = [scale * run[name] for run in runs if name in run]
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = ["| network | parameters | multiply-adds | loss | FD | accuracy, % | nearest |",
             "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        sizes = "- | -" if row["parameters_M"] is None else \
            f"{row['parameters_M']:.2f} M | {row['multiply_adds_M']:.1f} M"
        runs = row["runs"]
        lines.append(
            f"| {name} | {sizes} | {figure(runs, 'loss', 4)} | {figure(runs, 'frechet', 2)} | "
            f"{figure(runs, 'accuracy', 1, 100)} | {figure(runs, 'nearest', 3)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder for the runs' results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("--json", type=Path, help="where to write everything")
    parser.add_argument("--picture", type=Path, help="where to draw digits of every network, of the first seed")
    parser.add_argument("--run", choices=list(NETWORKS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.run:
        do_run(chosen.run, chosen.seeds[0], result_path(chosen.out, chosen.run, chosen.seeds[0]), chosen.steps)
        return
    do_all(chosen.out, chosen.seeds, chosen.networks, chosen.steps, chosen.side_by_side)
    rows = summary(chosen.out, chosen.seeds, chosen.networks)
    print(table(rows))
    if chosen.json:
        facts = {
            "networks": rows, "training": TRAINING.to_dict() | {"steps": chosen.steps}, "sampler": SAMPLER,
            "sampling_steps": NUM_STEPS, "lamamba": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        write_atomically(chosen.json, json.dumps(facts, indent=2) + "\n")
    if chosen.picture:
        draw_networks(chosen.out, chosen.networks, chosen.seeds[0], chosen.picture)


if __name__ == "__main__":
    main()
