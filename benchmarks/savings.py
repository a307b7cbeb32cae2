r"""A guided picture as cheap as it gets: each saving alone and all together, on the digits, and their times for XL.

    lamamba compress shipped --remove 0.5 --by multiply-adds --heal 300 --out runs/half
    lamamba train digits_few_steps --start.source runs/half/healed --steps 5000 --flow-map.student-share 0 \
        --out runs/half_few
    python benchmarks/savings.py --half runs/half/healed --half-few runs/half_few --json benchmarks/results/savings.json
    python benchmarks/savings.py --xl 256 512 --json benchmarks/results/savings.json          (only times; added)

evaluations   full passes of the original network to which the products, scans and norms of one picture amount.
seconds       of processor time for a picture, drawn by the hundred on one thread.
distance      Frechet distance between the pixels of the samples and of all 1,797 real digits, as in few_steps.py, less
              that of real digits drawn as often; guidance 1.75; mean and deviation over ranges of seeds.

Times of XL are of one pass each, in turns, with random weights, times the number of passes; DiT-XL/2 beside it. They
are of processor time, too: with more --threads than one, of all together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.few_steps import frechet_distance, real_floor, rows
from benchmarks.int8 import build
from benchmarks.timing import medians
from lamamba.benchmarking.environment import commit, device_name, versions
from lamamba.benchmarking.flops import count, shallow_share
from lamamba.benchmarking.peers.registry import build_peer
from lamamba.config import UNetConfig
from lamamba.data.digits import Digits
from lamamba.inference.packing import pack_weights
from lamamba.inference.quantizing import quantize
from lamamba.metrics.digits import DigitClassifier
from lamamba.models.deep_cache import LaMambaCacheConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.runs.model import FEW_STEPS, SHIPPED, open_network
from lamamba.sampling import generate

GUIDANCE = 1.75
FIRST_SEED = 300_000
BATCH_SIZE = 100


@dataclass(frozen=True)
class Way:
    """A way to draw a picture."""

    name: str
    model: str
    """shipped, few (its flow map), half (half its operations, healed), or half-few (that one's flow map)."""
    steps: int
    sampler: str | None = None
    cache: int | None = None
    int8: bool = False

    @property
    def passes(self) -> int:
        """Of the network, in one step; a flow map has its guidance in it."""
        return 1 if self.model.endswith("few") else 2


WAYS = (
    Way("28 steps of Euler", "shipped", 28, "flow-euler"),
    Way("8 steps of UniPC", "shipped", 8, "flow-unipc"),
    Way("deep features kept, every 4th", "shipped", 28, "flow-euler", cache=4),
    Way("int8 products", "shipped", 28, "flow-euler", int8=True),
    Way("half the operations", "half", 28, "flow-euler"),
    Way("flow map, 2 steps", "few", 2),
    Way("flow map, 1 step", "few", 1),
    Way("flow map of half the operations, 2 steps", "half-few", 2),
    Way("flow map of half the operations, 1 step", "half-few", 1),
    Way("flow map of half the operations, 1 step, int8", "half-few", 1, int8=True),
)


def evaluations(way: Way, config: UNetConfig, original: UNetConfig) -> float:
    """Full passes of the original network for one picture."""
    whole = way.steps
    if way.cache:
        full = LaMambaCacheConfig(interval=way.cache).full_passes(way.steps)
        whole = full + shallow_share(config) * (way.steps - full)
    return way.passes * whole * count(config).paper_total / count(original).paper_total


def draw(way: Way, model: LaMambaUNet, first: int, images: int) -> tuple[np.ndarray, float]:
    """(n, h, w, 1) uint8 from seeds first and on, and the processor time of one of them."""
    cache = None if way.cache is None else LaMambaCacheConfig(interval=way.cache)
    began = time.process_time()
    made = generate(
        model, [k % 10 for k in range(images)], range(first, first + images), sampler=way.sampler, num_steps=way.steps,
        guidance=GUIDANCE, batch_size=BATCH_SIZE, cache=cache,
    )
    return made, (time.process_time() - began) / images


def measure_digits(paths: dict[str, str], images: int, ranges: int, save: Callable[[], None], rows_: list[Any]) -> None:
    """Add a row for every way whose model is there."""
    digits = Digits(8)
    real, classifier = rows(digits.images), DigitClassifier(digits.images, digits.labels)
    floor, labels = real_floor(real, images), np.array([k % 10 for k in range(images)])
    original = open_network(SHIPPED)[0].architecture
    ways = [way for way in WAYS if way.model in paths]
    for way in ways:
        model = open_network(paths[way.model])[0].eval()
        if way.int8:
            quantize(model, "int8-dynamic")
        row: dict[str, Any] = {
            "name": way.name, "model": way.model, "evaluations": evaluations(way, model.architecture, original),
            "distance": [], "recognised": [], "seconds": [],
        }
        rows_.append(row)
        for number in range(ranges):
            made, seconds = draw(way, model, FIRST_SEED + number * images, images)
            row["distance"].append(frechet_distance(rows(made), real) - floor)
            row["recognised"].append(float((classifier.classify(made) == labels).mean()))
            row["seconds"].append(seconds)
        print(f"{way.name}: {row['evaluations']:.2f} evaluations, distance {statistics.mean(row['distance']):.4f}, "
              f"{statistics.median(row['seconds']) * 1e3:.1f} ms", flush=True)
        save()


def measure_xl(image_size: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a guided picture in bfloat16, a row for each way; two images at a time, as guidance has them."""
    config, bfloat16, images = UNetConfig.preset("xl", image_size=image_size), torch.bfloat16, 2
    tokens = images * config.token_grid[0] * config.token_grid[1]
    plain, int8 = build(config, None, tokens), build(config, "int8-dynamic", tokens)
    dit = build_peer("dit-xl-2", image_size, torch.device("cpu"), bfloat16).eval()
    pack_weights(dit, tokens // 4)
    x = torch.randn(images, config.in_channels, *config.input_size).to(bfloat16)
    time_and_labels = torch.full((images,), 500.0), torch.zeros(images, dtype=torch.int64)
    with torch.no_grad():
        deep = plain(x, *time_and_labels, return_features=("deep",))[1]["deep"]
        passes: dict[str, Callable[[], Any]] = {
            "full": lambda: plain(x, *time_and_labels), "int8": lambda: int8(x, *time_and_labels),
            "shallow": lambda: plain(x, *time_and_labels, deep_features=deep), "dit": lambda: dit(x, *time_and_labels),
        }
        one = medians(passes, repeats, time.process_time)
    full = LaMambaCacheConfig(interval=4).full_passes(28)
    seconds = {                                                                 # a pass of two images is a guided step
        "DiT-XL/2, 28 steps": 28 * one["dit"], "28 steps": 28 * one["full"], "8 steps of UniPC": 8 * one["full"],
        "28 steps, deep features kept, every 4th": full * one["full"] + (28 - full) * one["shallow"],
        "28 steps, int8 products": 28 * one["int8"],
        "flow map, 2 steps": 2 * one["full"] / 2, "flow map, 1 step": one["full"] / 2,
        "flow map, 1 step, int8 products": one["int8"] / 2,
    }
    return [{"name": name, "seconds": value} for name, value in seconds.items()]


def markdown(facts: dict[str, Any]) -> str:
    """The digits' table, then a column of seconds for each size of XL."""
    lines = ["| | evaluations | ms | distance | recognised |", "|---|---|---|---|---|"]
    for row in facts.get("rows", ()):
        spread = statistics.stdev(row["distance"]) if len(row["distance"]) > 1 else 0.0
        lines.append(
            f"| {row['name']} | {row['evaluations']:.2f} | {statistics.median(row['seconds']) * 1e3:.1f} | "
            f"{statistics.mean(row['distance']):.4f} ± {spread:.4f} | {statistics.mean(row['recognised']):.1%} |"
        )
    sizes = list(facts.get("xl", {}))
    if sizes:
        titles = " | ".join(f"{size} px" for size in sizes)
        lines += ["", f"| XL, seconds | {titles} |", "|---" * (1 + len(sizes)) + "|"]
        for number, row in enumerate(facts["xl"][sizes[0]]):
            cells = [f"{facts['xl'][size][number]['seconds']:.2f}" for size in sizes]
            lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", help="the pruned and healed network")
    parser.add_argument("--half-few", help="its flow map")
    parser.add_argument("--few", default=FEW_STEPS, help="the flow map of the whole network")
    parser.add_argument("--images", type=int, default=5000, help="of each way and range")
    parser.add_argument("--ranges", type=int, default=3)
    parser.add_argument("--xl", type=int, nargs="*", help="only the times of XL, for images of these sides")
    parser.add_argument("--repeats", type=int, default=3, help="of the times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    facts: dict[str, Any] = json.loads(chosen.json.read_text(encoding="utf-8")) if (
        chosen.json and chosen.json.is_file()) else {}
    facts |= {"device": device_name("cpu"), "versions": versions("diffusers"), "commit": commit(),
              "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "threads": chosen.threads}

    def save() -> None:
        if chosen.json:
            chosen.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    if chosen.xl:
        facts.setdefault("xl", {}).update({str(size): measure_xl(size, chosen.repeats) for size in chosen.xl})
    else:
        paths = {"shipped": SHIPPED, "few": chosen.few, "half": chosen.half, "half-few": chosen.half_few}
        facts["rows"], facts["images"] = [], chosen.images
        measure_digits({k: v for k, v in paths.items() if v}, chosen.images, chosen.ranges, save, facts["rows"])
    save()
    print("\n" + markdown(facts))


if __name__ == "__main__":
    main()
