r"""Deep features kept between steps against its honest rival, fewer steps: distance to the digits at equal cost.

    python benchmarks/cache.py --json benchmarks/results/cache.json --picture docs/cache.png
    python benchmarks/cache.py --times --json benchmarks/results/cache.json         (only the times; added to the file)

The model that comes with the package draws digits without guidance, the same seeds for all settings. A cost is in full
evaluations of the network: full passes, plus shallow ones times their share of a full one's operations.

distance      Frechet distance between the pixels of the samples and of all 1,797 real digits, less that of as many
              images drawn at random from the real ones: most of the distance of few images is the estimator's bias.
recognised    share that the classifier of lamamba/metrics/digits.py takes for the digit that was asked for.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.few_steps import frechet_distance, real_floor, rows
from benchmarks.timing import medians
from lamamba.benchmarking.environment import commit, device_name, versions
from lamamba.benchmarking.flops import shallow_share
from lamamba.config import UNetConfig
from lamamba.data.digits import Digits
from lamamba.metrics.digits import DigitClassifier
from lamamba.models.deep_cache import LaMambaCacheConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.pretrained import shipped_model
from lamamba.runs.model import open_network
from lamamba.sampling import generate
from lamamba.viz.curves import tidy

SAMPLERS = {
    "flow-euler": ([28, 20, 17, 16, 15], [(28, 2, 1), (28, 3, 1), (28, 3, 0), (28, 4, 1), (28, 5, 1)]),
    "flow-dpm++": ([12, 9, 8, 6], [(12, 2, 1), (12, 3, 1), (8, 2, 1)]),
    "flow-unipc": ([12, 9, 8, 6], [(12, 2, 1), (12, 3, 1), (8, 2, 1)]),
}
"""Numbers of steps without a cache; steps, interval and order with one."""
SETTING = ("sampler", "steps", "interval", "order", "full")
FIRST_SEED = 200_000
BATCH = 250


def settings(share: float, samplers: list[str]) -> list[dict[str, Any]]:
    """Every setting of these samplers with its cost."""
    chosen_samplers = {name: SAMPLERS[name] for name in samplers}
    found = []
    for sampler, (plain, cached) in chosen_samplers.items():
        for steps, interval, order in [*((steps, 1, 1) for steps in plain), *cached]:
            full = LaMambaCacheConfig(interval=interval, order=order).full_passes(steps)
            found.append({
                "sampler": sampler, "steps": steps, "interval": interval, "order": order, "full": full,
                "cost": round(full + share * (steps - full), 2), "distance": [], "recognised": [], "seconds": [],
            })
    return found


def measure(chosen: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Sample every setting in every range of seeds; results are saved after each of them, and what is there is kept."""
    model = open_network(shipped_model())[0].eval()
    digits = Digits(8)
    real, labels = rows(digits.images), [k % 10 for k in range(chosen.images)]
    classifier, floor = DigitClassifier(digits.images, digits.labels), real_floor(real, chosen.images)
    share = shallow_share(model.architecture)
    done = facts.get("rows", []) if facts.get("images") == chosen.images else []
    wanted = settings(share, chosen.samplers)
    facts |= {"images": chosen.images, "real_digits_distance": floor, "digits_share": share, "rows": [
        next((row for row in done if all(row[key] == each[key] for key in SETTING)), each) for each in wanted]}
    for number in range(chosen.ranges):
        first = FIRST_SEED + number * chosen.images
        for row in facts["rows"]:
            if len(row["distance"]) > number:
                continue
            cache = LaMambaCacheConfig(interval=row["interval"], order=row["order"])
            began = time.perf_counter()
            images = generate(
                model, labels, range(first, first + len(labels)), sampler=row["sampler"], num_steps=row["steps"],
                batch_size=BATCH, cache=None if row["interval"] == 1 else cache,
            )
            row["seconds"].append(time.perf_counter() - began)
            row["distance"].append(frechet_distance(rows(images), real) - floor)
            row["recognised"].append(float((classifier.classify(images) == np.array(labels)).mean()))
            print(f"range {number}: {row['sampler']} {row['steps']} every {row['interval']} order {row['order']} cost"
                  f" {row['cost']:.1f} distance {row['distance'][-1]:.4f} recognised {row['recognised'][-1]:.3f} "
                  f"{row['seconds'][-1]:.0f} s", flush=True)
            save(chosen.json, facts)


def save(path: Path | None, facts: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def time_passes(model: LaMambaUNet, images: int, repeats: int) -> dict[str, float]:
    """Medians of the seconds of a full and of a shallow pass, with conditioning computed ahead."""
    config = model.architecture
    x = torch.randn(images, config.in_channels, *config.input_size)
    with torch.no_grad():
        conditioning = model.condition(torch.full((images,), 500.0), torch.zeros(images, dtype=torch.int64))

        def full() -> torch.Tensor:
            return model(x, None, conditioning=conditioning, return_features=("deep",))[1]["deep"]

        deep = full()
        shallow = functools.partial(model, x, None, conditioning=conditioning, deep_features=deep)
        return medians({"full": full, "shallow": shallow}, repeats)


def measure_times(facts: dict[str, Any], repeats: int) -> None:
    """Of the digits model, and of XL for 256 pixels with random weights, in float32."""
    xl = UNetConfig.preset("xl", image_size=256)
    facts["xl_share"], facts["times"] = shallow_share(xl), []
    for name, model, images in (
        ("digits", open_network(shipped_model())[0].eval(), 100), ("xl 256", LaMambaUNet(xl).eval(), 2),
    ):
        found = time_passes(model, images, repeats)
        facts["times"].append({"model": name, "images": images, "threads": torch.get_num_threads(), **found})
        print(f"{name}, {images} images: full {found['full']:.4f} s, shallow {found['shallow']:.4f} s, "
              f"{found['shallow'] / found['full']:.1%}", flush=True)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{statistics.mean(values):.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def rival_of(row: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the same sampler without a cache, the fewest steps that cost as much or more."""
    plain = [each for each in found if each["sampler"] == row["sampler"] and each["interval"] == 1]
    return min((each for each in plain if each["steps"] >= row["cost"]), key=lambda each: each["steps"])


def markdown(found: list[dict[str, Any]]) -> str:
    """A row for each setting with a cache, beside the same steps without one and as many steps as it costs."""
    text = ["| sampler | steps, interval, order | cost | distance | without cache | fewer steps | their distance |",
            "|---|---|---|---|---|---|---|"]
    for row in found:
        if row["interval"] == 1:
            continue
        whole = [each for each in found if (each["sampler"], each["steps"], each["interval"]) == (
            row["sampler"], row["steps"], 1)]
        rival = rival_of(row, found)
        text.append(
            f"| `{row['sampler']}` | {row['steps']}, {row['interval']}, {row['order']} | {row['cost']:.1f} | "
            f"{spread(row['distance'])} | {spread(whole[0]['distance']) if whole else ''} | {rival['steps']} | "
            f"{spread(rival['distance'])} |"
        )
    return "\n".join(text) + "\n"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Distance over cost: a panel for each sampler, a line of fewer steps and one of the cache."""
    samplers = list(dict.fromkeys(row["sampler"] for row in found))
    figure = Figure(figsize=(max(6, 4 * len(samplers)), 4.6))
    panels = figure.subplots(1, len(samplers), sharey=True, squeeze=False)[0]
    for axes, sampler in zip(panels, samplers, strict=True):
        for kind, colour, marker, label in (
            ("plain", "0.35", "o", "without: steps"),
            ("1", "tab:blue", "D", "deep features extrapolated: steps/interval"),
            ("0", "tab:orange", "s", "deep features repeated (order 0)"),
        ):
            shown = [row for row in found if row["sampler"] == sampler and kind == (
                "plain" if row["interval"] == 1 else str(row["order"]))]
            shown.sort(key=lambda row: row["cost"])
            means = [statistics.mean(row["distance"]) for row in shown]
            errors = [statistics.stdev(row["distance"]) if len(row["distance"]) > 1 else 0 for row in shown]
            axes.errorbar([row["cost"] for row in shown], means, errors, color=colour, marker=marker, capsize=3,
                          linestyle="-" if kind == "plain" else "none", label=label if shown else None)
            for row, mean in zip(shown, means, strict=True):
                name = f"{row['steps']}" if kind == "plain" else f"{row['steps']}/{row['interval']}"
                place, side = ((4, 5), "left") if kind == "plain" else ((0, -14), "center")
                axes.annotate(name, (row["cost"], mean), xytext=place, textcoords="offset points", fontsize=8,
                              color=colour, ha=side)
        axes.set(title=sampler, xlabel="cost in full evaluations per image")
        axes.margins(x=0.25, y=0.15)
    tidy(panels)
    panels[0].set_ylabel("Fréchet distance to real digits, less theirs")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="of each setting and range of seeds")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--ranges", type=int, default=5, help="of seeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", action="store_true", help="only the times of a full and a shallow pass")
    parser.add_argument("--repeats", type=int, default=5, help="of the times")
    parser.add_argument("--json", type=Path, help="results; the same command goes on, --times adds to them")
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)

    facts: dict[str, Any] = json.loads(chosen.json.read_text(encoding="utf-8")) if (
        chosen.json and chosen.json.is_file()) else {}
    facts |= {"device": device_name("cpu"), "versions": versions("diffusers"), "commit": commit(),
              "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if chosen.times:
        measure_times(facts, chosen.repeats)
    elif chosen.ranges:
        measure(chosen, facts)
    save(chosen.json, facts)
    if "rows" in facts:
        print("\n" + markdown(facts["rows"]))
        if chosen.picture:
            draw(facts["rows"], chosen.picture)


if __name__ == "__main__":
    main()
