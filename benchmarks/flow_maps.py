r"""How near do one, two and four evaluations of a flow map come to its teacher's 28, or 28 x 2 with guidance?

    lamamba train digits_few_steps --seed 0 --out runs/few0             # and seeds 1 and 2
    python benchmarks/flow_maps.py runs/few0 runs/few1 runs/few2 --images cache --json benchmarks/results/flow-maps.json

Every set of images has the same seeds and labels for all, in ranges of its own: the ratio of two distances is taken
range by range, so that what seeds share drops out of its interval (95 %, Student's t over the ranges). The distances
themselves are those of all ranges together. Images are kept, so the same command goes on; scales that the JSON file has
from another call stay in it.

distance      Fréchet distance between the pixels of the samples and of all 1,797 real digits, as in few_steps.py, minus
              that of real digits, drawn as often with replacement: what is left of the bias of a finite number.
to teacher    Fréchet distance to the teacher's images of the same seeds, so that guiding less than the teacher does not
              win; in units of the distance between the teacher's images of two different ranges.
recognised    share that the classifier of lamamba/metrics/digits.py takes for the digit that was asked for.
variance      of the pixels, summed, within a class: in the JSON file alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.few_steps import frechet_distance, real_floor, rows
from lamamba import __version__
from lamamba.benchmarking.environment import commit
from lamamba.data.digits import Digits
from lamamba.metrics.digits import DigitClassifier
from lamamba.runs.model import fingerprint, open_network
from lamamba.sampling import generate
from lamamba.viz.curves import save_figure

PER_RANGE = {1.0: 2000, 1.75: 1000, 3.0: 500}
"""Images of each range by guidance scale: the larger the distance, the fewer tell ratios apart."""
STEPS = (1, 2, 4)
TEACHER_STEPS = 28
FIRST_SEED = 50_000
BATCH_SIZE = 100
BLOCK = 500
"""Images in a file; ranges are multiples of it."""
FLOOR_DRAWS = 20


class Samples:
    """Images of a network by scale, steps and range of seeds, kept on disk."""

    def __init__(self, path: str, folder: Path, per_range: int):
        self.network, _ = open_network(path)
        self.sha256, self._folder, self._per_range = fingerprint(self.network), folder, per_range

    def images(self, scale: float, steps: int, number: int) -> np.ndarray:
        """(n, h, w, 1) uint8 of a range of seeds; labels take turns."""
        first = number * self._per_range
        return np.concatenate([
            self._block(scale, steps, start) for start in range(first, first + self._per_range, BLOCK)
        ])

    def _block(self, scale: float, steps: int, start: int) -> np.ndarray:
        file = self._folder / f"{self.sha256[:12]}-scale{scale:g}-steps{steps}-{start:05d}.npy"
        if not file.is_file():
            first = FIRST_SEED + start
            images = generate(
                self.network, labels_of(BLOCK), range(first, first + BLOCK), num_steps=steps, guidance=scale,
                batch_size=BATCH_SIZE,
            )
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(file, images)
            print(file.name, flush=True)
        return np.load(file)


def labels_of(count: int) -> list[int]:
    return [k % 10 for k in range(count)]


def interval(ratios: list[float]) -> dict[str, float]:
    """Mean over the ranges, and half of its 95 % interval."""
    half = float(scipy.stats.t.ppf(0.975, len(ratios) - 1) * scipy.stats.sem(ratios)) if len(ratios) > 1 else 0.0
    return {"mean": float(np.mean(ratios)), "half_interval": half}


class Scorer:
    """Distances of sets of images, each a list of ranges."""

    def __init__(self, per_range: int, num_ranges: int):
        digits = Digits(8)
        self._real, self._classifier = rows(digits.images), DigitClassifier(digits.images, digits.labels)
        self._floor = real_floor(self._real, per_range, FLOOR_DRAWS)
        self.whole_floor = real_floor(self._real, per_range * num_ranges, FLOOR_DRAWS)
        self._labels = np.array(labels_of(per_range))

    def distances(self, ranges: list[np.ndarray]) -> list[float]:
        """Of each range, minus the floor."""
        return [frechet_distance(rows(images), self._real) - self._floor for images in ranges]

    def scores(self, ranges: list[np.ndarray]) -> dict[str, Any]:
        """Of all ranges together, and of each."""
        return {
            "distance": frechet_distance(rows(np.concatenate(ranges)), self._real) - self.whole_floor,
            "distances": self.distances(ranges),
            "recognised": float(np.mean([self._classifier.classify(images) == self._labels for images in ranges])),
            "variance": float(np.mean([
                rows(images[self._labels == label]).var(0).sum() for images in ranges for label in range(10)])),
        }


def score_scale(
    teacher: str, students: list[tuple[str, int]], folder: Path, scale: float, per_range: int, num_ranges: int
) -> dict[str, Any]:
    """The scores of the teacher and of all students, each with a number of steps, at one scale."""
    scorer, ranges = Scorer(per_range, num_ranges), range(num_ranges)
    whole = Samples(teacher, folder, per_range)
    expected = [whole.images(scale, TEACHER_STEPS, number) for number in ranges]
    apart = [frechet_distance(rows(a), rows(b)) for a, b in zip(expected, expected[1:] + expected[:1], strict=True)]
    result: dict[str, Any] = {
        "images": sum(map(len, expected)), "ranges": len(expected), "floor": scorer.whole_floor,
        "teacher": {"steps": TEACHER_STEPS, "evaluations": TEACHER_STEPS * (1 if scale == 1 else 2),
                    "floor_between_ranges": float(np.mean(apart)), **scorer.scores(expected)},
        "students": [],
    }
    for path, steps in students:
        student = Samples(path, folder, per_range)
        found = [student.images(scale, steps, number) for number in ranges]
        scores = scorer.scores(found)
        own = [frechet_distance(rows(a), rows(b)) for a, b in zip(found, expected, strict=True)]
        pairs = zip(scores["distances"], result["teacher"]["distances"], strict=True)
        result["students"].append({
            "sha256": student.sha256, "steps": steps, "evaluations": steps, **scores,
            "ratio": interval([a / b for a, b in pairs]),
            "to_teacher": float(np.mean(own)), "to_teacher_in_floors": float(np.mean(own) / np.mean(apart)),
        })
    return result


def judge(
    students: list[tuple[str, int]], folder: Path, json_file: Path | None, *, teacher: str = "shipped",
    scales: Iterable[float] = PER_RANGE, per_range: int | None = None, num_ranges: int = 5,
) -> str:
    """Score students, each a model with a number of steps: the table. Other scales stay in the file."""
    torch.set_num_threads(1)
    result = {
        "date": datetime.date.today().isoformat(), "lamamba": __version__, "commit": commit(),
        "torch": torch.__version__, "first_seed": FIRST_SEED, "teacher_sha256": fingerprint(open_network(teacher)[0]),
        "scales": {
            f"{scale:g}": score_scale(teacher, students, folder, scale, per_range or PER_RANGE[scale], num_ranges)
            for scale in scales
        },
    }
    if json_file and json_file.is_file():                                       # other scales, with other numbers
        before = json.loads(json_file.read_text(encoding="utf-8"))
        result["scales"] = dict(sorted({**before["scales"], **result["scales"]}.items()))
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return markdown(result)


def markdown(result: dict[str, Any]) -> str:
    """A table: a row for each scale and number of evaluations, the mean over students with their range."""
    lines = [
        "| scale | evaluations | distance | of the teacher's | to the teacher's images, in floors | recognised |",
        "|---|---|---|---|---|---|",
    ]

    def over(values: list[float], form: str) -> str:
        mean = form.format(float(np.mean(values)))
        return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"

    for scale, entry in result["scales"].items():
        teacher = entry["teacher"]
        lines.append(f"| {scale} | teacher, {teacher['evaluations']} | {teacher['distance']:.4f} | 1 | "
                     f"| {teacher['recognised']:.1%} |")
        for steps in dict.fromkeys(line["steps"] for line in entry["students"]):
            of = [line for line in entry["students"] if line["steps"] == steps]
            lines.append(
                f"| {scale} | {steps} | {over([line['distance'] for line in of], '{:.4f}')} | "
                f"{over([line['ratio']['mean'] for line in of], '{:.2f}')} ± "
                f"{max(line['ratio']['half_interval'] for line in of):.2f} | "
                f"{over([line['to_teacher_in_floors'] for line in of], '{:.2f}')} | "
                f"{over([line['recognised'] for line in of], '{:.1%}')} |"
            )
    return "\n".join(lines)


def draw(teacher: str, student: str, folder: Path, path: Path) -> None:
    """Ten digits of the same seeds by the teacher and by a flow map in 1, 2 and 4 steps, a panel for each scale."""
    figure = Figure(figsize=(13, 2.3))
    whole, few = (Samples(name, folder, BLOCK) for name in (teacher, student))
    names = [f"teacher, {TEACHER_STEPS} steps", *(f"flow map, {n} step{'s' if n > 1 else ''}" for n in STEPS)]
    panels = figure.subplots(1, len(PER_RANGE))
    for axes, scale in zip(panels, PER_RANGE, strict=True):
        found = [whole.images(scale, TEACHER_STEPS, 0), *(few.images(scale, steps, 0) for steps in STEPS)]
        tiles = [np.pad(images[:10, :, :, 0], ((0, 0), (1, 1), (1, 1)), constant_values=70) for images in found]
        axes.imshow(np.concatenate([np.hstack(row) for row in tiles]), cmap="gray")
        axes.set(title=f"scale {scale:g}", xticks=[], yticks=[])
        height = tiles[0].shape[1]
        if axes is panels[0]:
            axes.set_yticks([height * (row + 0.5) - 0.5 for row in range(len(names))], names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", help="runs or models of flow maps, one for each training seed")
    parser.add_argument("--teacher", default="shipped")
    parser.add_argument("--images", type=Path, required=True, help="folder where images are kept")
    parser.add_argument("--per-range", type=int, help=f"images, a multiple of {BLOCK}; by default {PER_RANGE}")
    parser.add_argument("--ranges", type=int, default=5)
    parser.add_argument("--scales", type=float, nargs="*", default=list(PER_RANGE))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="of the first student's images beside the teacher's")
    chosen = parser.parse_args()
    if chosen.per_range is None and (unknown := set(chosen.scales) - set(PER_RANGE)):
        parser.error(f"scales {sorted(unknown)} need --per-range")
    if chosen.per_range and chosen.per_range % BLOCK:
        parser.error(f"--per-range {chosen.per_range} is no multiple of {BLOCK}")
    print(judge(
        [(path, steps) for path in chosen.students for steps in STEPS], chosen.images, chosen.json,
        teacher=chosen.teacher, scales=chosen.scales, per_range=chosen.per_range, num_ranges=chosen.ranges,
    ))
    if chosen.picture and chosen.students:
        draw(chosen.teacher, chosen.students[0], chosen.images, chosen.picture)


if __name__ == "__main__":
    main()
