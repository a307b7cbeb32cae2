r"""What compression costs and saves: healing by several losses, and time.

    lamamba compress compare shipped --reference digits --features digits --out compare
    python benchmarks/compression.py heal times time xl --work work --json benchmarks/results/compression-digits.json
    python benchmarks/compression.py report --compare compare --json benchmarks/results/compression-digits.json

heal    the digits model of the package without 50 and 80 % of its parameters, trained for 300 steps by each loss and
        seed: relative output loss on samples that no unit was scored on; Fréchet distance and share recognised of
        1,000 images without guidance, the mean over three ranges of image seeds.
times   the same before healing, planned on scores from ranges of timesteps: does a weighting by time help?
time    pruned digits networks in turns with the whole one, batches of 64 images.
xl      XL at 256 px with random weights, planned by the measured time of its units (their magnitude stands in for
        scores: random weights have none that mean anything), then built and timed in turns with the whole one.
report  tables in Markdown of the above, and of compare.json.

What the file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import lamamba
from lamamba.api.compress import calibrate, open_teacher
from lamamba.benchmarking.environment import commit, device_name, versions
from lamamba.compression import find_units, make_plan
from lamamba.compression.additivity import SetLoss, rank_correlation, relative_distance
from lamamba.compression.plan import Plan
from lamamba.compression.scores import by_rule
from lamamba.compression.timing import measure_pair, measure_times
from lamamba.options.compress import CompressOptions
from lamamba.options.training import DistillOptions, TrainConfig, TrainOptions
from lamamba.runs.model import open_network
from lamamba.utils.progress import Progress

MODEL, STEPS, SHARES, SEEDS = "shipped", 300, (0.8, 0.5), (0, 1, 2)
NUM_IMAGES, IMAGE_SEEDS = 1000, (0, 1000, 2000)
DISTILLED = DistillOptions(teacher=MODEL)
LOSSES = {
    "task": DistillOptions(),
    "output": dataclasses.replace(DISTILLED, features="none"),
    "normalised": DISTILLED,
    "normalised, weight 0.05": dataclasses.replace(DISTILLED, feature=0.05),
    "normalised, weight 1": dataclasses.replace(DISTILLED, feature=1.0),
    "plain, weight 1": dataclasses.replace(DISTILLED, features="plain", feature=1.0),
    "plain, weight 0.001": dataclasses.replace(DISTILLED, features="plain", feature=0.001),
}
RANGES, RANGED_SHARES = ((0, 1000), (700, 1000)), (0.5, 0.6, 0.7)
TIMED_SHARES, BATCH = (0.3, 0.5, 0.8), 64
XL_SHARE = 0.3


class Results:
    """The JSON file, written after every measurement."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def measure(self, section: str, key: str, make: Callable[[], dict[str, Any]]) -> None:
        entries = self.values.setdefault(section, {})
        if key in entries:
            return
        entries[key] = {**make(), "commit": commit()}
        self.values |= {"device": device_name("cpu"), "versions": versions("numpy", "scipy"), "date": str(date.today())}
        self.path.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        print(section, key, {name: value for name, value in entries[key].items() if name != "removed"}, flush=True)


def compressed(work: Path, share: float, **changes: Any) -> lamamba.CompressResult:
    options = CompressOptions(model=MODEL, remove=share, out=work / f"{share:g}", device="cpu", **changes)
    return lamamba.compress(options, progress=None)


class Scorer:
    """Relative output loss on samples that no unit was scored on, Fréchet distance and share recognised."""

    def __init__(self, work: Path):
        teacher = open_teacher(MODEL, torch.device("cpu"))
        options = CompressOptions(model=MODEL, remove=SHARES[0], out=work, device="cpu")
        self.work, self.held_out = work, calibrate(teacher, options, held_out=True)
        self.whole = self.held_out.predictions(teacher.network)

    def __call__(self, path: Path, share: float) -> dict[str, Any]:
        network = open_network(path)[0]
        figures = [lamamba.evaluate(lamamba.EvaluateOptions(
            samples=str(path), reference="digits", features="digits", num_images=NUM_IMAGES, seed=seed,
            out=self.work / "figures.json", device="cpu"), progress=None).figures for seed in IMAGE_SEEDS]
        return {"share": share, "loss": relative_distance(self.held_out.predictions(network), self.whole),
                **{name: statistics.mean(each[name] for each in figures) for name in ("frechet", "accuracy")}}


def heal(work: Path, results: Results, shares: Sequence[float]) -> None:
    score = Scorer(work)
    for share in shares:
        first = compressed(work, share, heal=STEPS, heal_learning_rate=1e-3)
        config = TrainConfig.from_dict(json.loads((first.path / "config.json").read_text(encoding="utf-8"))["train"])

        results.measure("heal", f"{share:g} before", lambda: score(first.pruned.path, share))   # noqa: B023 (called now)
        for seed in SEEDS:
            for name, options in LOSSES.items():
                run = work / f"{share:g}" / f"{name} {seed}".replace(",", "").replace(" ", "_")

                def train_and_score(run: Path = run, seed: int = seed, options: Any = options) -> dict[str, Any]:
                    changed = dataclasses.replace(config, seed=seed, distill=options)       # noqa: B023 (called now)
                    values = {entry.name: getattr(changed, entry.name) for entry in dataclasses.fields(changed)}
                    lamamba.train(TrainOptions(**values, out=run), progress=None)
                    return score(run, share)                                    # noqa: B023 (called now)

                results.measure("heal", f"{share:g} {name} {seed}", train_and_score)


def weight_times(work: Path, results: Results) -> None:
    score = Scorer(work)
    for low, high in RANGES:
        for share in RANGED_SHARES:
            def measure(low: float = low, high: float = high, share: float = share) -> dict[str, Any]:
                found = compressed(work / f"times-{low:g}-{high:g}", share, times=(float(low), float(high)))
                return score(found.pruned.path, share)

            results.measure("times", f"{share:g} by {low:g} to {high:g}", measure)


def forward_of(network: nn.Module, batch: int) -> Callable[[], object]:
    config = network.architecture
    x = torch.randn(batch, config.in_channels, *config.input_size)
    labels = torch.zeros(batch, dtype=torch.int64)

    def forward() -> object:
        with torch.inference_mode():
            return network(x, torch.full((batch,), 500.0), labels)

    return forward


def time_digits(work: Path, results: Results) -> None:
    for share in TIMED_SHARES:
        def measure(share: float = share) -> dict[str, Any]:
            found = compressed(work, share)
            networks = [open_network(path)[0] for path in (MODEL, found.pruned.path)]
            whole, pruned = measure_pair(
                *(forward_of(network, BATCH) for network in networks), torch.device("cpu"), rounds=60)
            return {"by": "parameters", "parameters": found.plan.parameters, "multiply_adds": found.plan.multiply_adds,
                    "images": BATCH, "whole_seconds": whole, "seconds": pruned, "time": 1 - pruned / whole}

        results.measure("time", f"digits {share:g}", measure)


def time_xl(results: Results) -> None:
    def measure() -> dict[str, Any]:
        torch.manual_seed(0)
        network = lamamba.LaMambaUNet(lamamba.UNetConfig.preset("xl", image_size=256, num_classes=1000)).eval()
        units = find_units(network)

        def report(progress: Progress) -> None:
            print(f"\r{progress.task} {progress.done}/{progress.total} {progress.note}", end="", file=sys.stderr)

        times = measure_times(units, forward_of(network, 1), report=report)
        plan: Plan = make_plan(by_rule(units, "magnitude", 0, {}), remove=XL_SHARE, by="time", times=times)
        pruned = units.without(plan.removed)
        whole, seconds = measure_pair(
            forward_of(network, 1), forward_of(pruned, 1), torch.device("cpu"), rounds=10)
        return {"by": "time", "share": XL_SHARE, "planned_time": plan.time, "time": 1 - seconds / whole,
                "whole_seconds": whole, "seconds": seconds, "parameters": plan.parameters,
                "multiply_adds": plan.multiply_adds, "images": 1, "removed": list(plan.removed), "units": times}

    results.measure("time", "xl 256 by time", measure)


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}"


def report(results: Results, compare: Path | None) -> str:
    lines: list[str] = []
    if compare is not None:
        lines += report_criteria(json.loads((compare / "compare.json").read_text(encoding="utf-8"))["entries"])
    if "heal" in results.values:
        lines += ["", "| removed | loss | relative output loss | Fréchet distance | recognised |", "|---" * 5 + "|"]
        heals = results.values["heal"]
        for share in SHARES:
            for name in ("before", *LOSSES):
                keys = [f"{share:g} {name}", *(f"{share:g} {name} {seed}" for seed in SEEDS)]
                entries = [heals[key] for key in keys if key in heals]
                if not entries:
                    continue
                columns = [mean_and_spread([entry[field] for entry in entries]) for field in ("loss", "frechet")]
                recognised = mean_and_spread([100 * entry["accuracy"] for entry in entries])
                lines.append(f"| {share:.0%} | {name} | {' | '.join(columns)} | {recognised} % |")
    if "times" in results.values:
        lines += ["", "| timesteps scored | " + " | ".join(f"{share:.0%}" for share in RANGED_SHARES) + " |",
                  "|---" * (len(RANGED_SHARES) + 1) + "|"]
        for low, high in RANGES:
            found = [results.values["times"][f"{share:g} by {low:g} to {high:g}"] for share in RANGED_SHARES]
            cells = [f"{each['loss']:.2g} / {each['frechet']:.3g} / {100 * each['accuracy']:.1f}" for each in found]
            lines.append(f"| {low:g} to {high:g} | " + " | ".join(cells) + " |")
    if "time" in results.values:
        lines += ["", "| network | parameters | multiply-adds | time | milliseconds |", "|---" * 5 + "|"]
        for key, entry in results.values["time"].items():
            lines.append(
                f"| {key} | -{entry['parameters']:.0%} | -{entry['multiply_adds']:.0%} | -{entry['time']:.0%} | "
                f"{1000 * entry['whole_seconds']:.0f} → {1000 * entry['seconds']:.0f} |")
    return "\n".join(lines)


def report_criteria(entries: dict[str, Any]) -> list[str]:
    points = {key: entry for key, entry in entries.items() if isinstance(entry, dict) and "criterion" in entry}
    shares = sorted({key.split()[1] for key in points})
    lines = ["| criterion | " + " | ".join(f"{float(share):.0%}" for share in shares) + " |",
             "|---" * (len(shares) + 1) + "|"]
    for criterion in dict.fromkeys(entry["criterion"] for entry in points.values()):
        cells = []
        for share in shares:
            found = []
            for key, entry in points.items():
                if key.startswith(f"{criterion} {share} "):
                    figures = next(v for k, v in entries.items() if k.startswith(f"samples of {key}:"))
                    found.append((entry["loss"], figures["frechet"], 100 * figures["accuracy"]))
            loss, distance, recognised = np.median(found, axis=0)
            cells.append(f"{loss:.2g} / {distance:.3g} / {recognised:.1f}")
        lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
    sets = [SetLoss(**each) for each in entries.get("sets", [])]
    for kind in ("sensible", "random"):
        some = [each for each in sets if each.kind == kind]
        if len(some) > 2:
            ratios = [[each.measured / value for each in some if (value := getattr(each, name))]
                      for name in ("predicted", "predicted_with_cross_terms")]
            lines += ["", f"{len(some)} {kind} sets: rank correlation {rank_correlation(some):.3f} (with cross terms "
                      f"{rank_correlation(some, with_cross_terms=True):.3f}), measured / predicted, median "
                      f"{np.median(ratios[0]):.2f} (with cross terms {np.median(ratios[1]):.2f})"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["heal", "times", "time", "xl", "report"])
    parser.add_argument("--work", type=Path, default=Path("compression"), help="folder for networks and runs")
    parser.add_argument("--json", type=Path, default=Path("compression.json"))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="removed before healing")
    parser.add_argument("--compare", type=Path, help="folder of lamamba compress compare, for the report")
    options = parser.parse_args()
    results = Results(options.json)
    if "heal" in options.parts:
        heal(options.work, results, options.shares)
    if "times" in options.parts:
        weight_times(options.work, results)
    if "time" in options.parts:
        time_digits(options.work, results)
    if "xl" in options.parts:
        time_xl(results)
    if "report" in options.parts:
        print(report(results, options.compare))


if __name__ == "__main__":
    main()
