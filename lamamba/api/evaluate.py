"""The work of `lamamba evaluate`: joins what is judged, feature networks and figures; any number of processes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import shutil
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from lamamba._version import __version__
from lamamba.evaluation.candidates import Candidate, Sampler, find_candidates, is_model, open_images
from lamamba.evaluation.extraction import Features, extract
from lamamba.evaluation.figures import Figures, judge, mean_and_spread, moments
from lamamba.evaluation.images import Images, digest, fit_channels
from lamamba.evaluation.reference import Reference, is_statistics, load_statistics, reference_images
from lamamba.evaluation.results import table, write_result
from lamamba.metrics.features import FeatureNetwork
from lamamba.metrics.networks import open_network
from lamamba.metrics.statistics import Statistics
from lamamba.utils.bars import WorkBar
from lamamba.utils.distributed import end_processes, is_main_process, launched_processes, local_device
from lamamba.utils.files import check_target
from lamamba.utils.progress import Progress, Report, reporting

if TYPE_CHECKING:
    from lamamba.options.evaluation import EvaluateArguments, StatsArguments

FIELD_COUNT = 50_000
"""Samples behind a published FID."""


class Group:
    """The processes that judge together; started by torchrun or alone."""

    def __init__(self) -> None:
        self.count, self.rank = launched_processes(), int(os.environ.get("RANK", "0"))
        self.is_main = is_main_process()
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(hours=12))        # the others wait while figures are made

    def sum_up(self, array: np.ndarray) -> np.ndarray:
        """The elementwise sum over processes, in float64."""
        if self.count == 1:
            return array
        box = torch.from_numpy(np.array(array, dtype=np.float64))
        dist.all_reduce(box)
        return box.numpy()

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


class Watch:
    """Reports the sampling steps of the batch in work beside the images that are done."""

    def __init__(self) -> None:
        self._report: Report | None = None
        self._last: Progress | None = None

    def through(self, report: Report) -> Report:
        """A report that this one repeats with each sampling step."""
        self._report, self._last = report, None

        def keep(progress: Progress) -> None:
            self._last = progress
            report(progress)

        return keep

    def __call__(self, step: int, steps: int) -> None:
        if self._report is not None and self._last is not None:
            self._report(dataclasses.replace(self._last, note=f"step {step}/{steps}"))


def collect(
    images: Images, network: FeatureNetwork, folder: Path, group: Group, text: str, chosen: Any,
    watch: Watch | None = None,
) -> Features:
    """Features of all images, made by all processes; the main one's part is shown."""
    with reporting("auto" if group.is_main else None) as report:
        features = extract(
            images, network, folder, shard_size=chosen.shard_size, batch_size=chosen.batch_size, rank=group.rank,
            report=watch.through(report) if watch else report, task=text,
        )
    group.wait()
    return features


def statistics_of(features: Features, group: Group) -> dict[str, Statistics]:
    """Of "features" and "spatial", over all processes: each sums up its part, and one reduction joins them."""
    shards = range(features.num_shards)[group.rank :: group.count]
    names = [name for name in ("features", "spatial") if name in features.names()]
    return {name: features.statistics(name, shards).reduce(group.sum_up) for name in names}


def reference_of(
    images: Images, name: str, network: FeatureNetwork, folder: Path, group: Group, rows: int, chosen: Any
) -> Reference:
    """A reference made of images."""
    features = collect(images, network, folder, group, "reference", chosen)
    found = statistics_of(features, group)
    return Reference(
        name=name, fingerprint=str(images.facts["fingerprint"]), features=moments(found["features"]),
        spatial=moments(found["spatial"]) if "spatial" in found else None, rows=features.rows(limit=rows),
        count=len(images), image_shape=tuple(images.shape), network=network.info,
    )


def open_reference(chosen: EvaluateArguments, shape: tuple[int, ...], network: FeatureNetwork, work: Path, group: Group
                   ) -> Reference:
    """What samples of this shape are compared with; made of images where it is no file of statistics.

    Raises:
        FileNotFoundError, ValueError: when it is missing, damaged or does not fit.
    """
    rows, repeat = chosen.metrics.reference_rows, chosen.grey == "repeat"
    if not (chosen.reference.endswith(".npz") and is_statistics(chosen.reference)):
        images = open_images(chosen.reference, image_size=shape[0])
        if images.shape[:2] != shape[:2]:
            sizes = " and ".join(f"{s[0]} x {s[1]}" for s in (images.shape, shape))
            raise ValueError(
                f"{chosen.reference} and the samples are {sizes} pixels; another size is another data set"
            )
        images = fit_channels(images, network.info.channels, network.info.name, repeat_grey=repeat)
        return reference_of(images, chosen.reference, network, work, group, rows, chosen)
    reference = load_statistics(chosen.reference)
    reference.check(network.info, shape)
    inside = reference_images(chosen.reference)
    if reference.rows is None and inside is not None:                           # ADM's: moments of all, images of some
        images = fit_channels(inside, network.info.channels, network.info.name, repeat_grey=repeat)
        features = collect(images, network, work, group, "reference", chosen)
        reference = dataclasses.replace(reference, rows=features.rows(limit=rows))
    elif reference.rows is not None and len(reference.rows) > rows:
        reference = dataclasses.replace(reference, rows=reference.rows[np.arange(rows) * len(reference.rows) // rows])
    size = len(reference.features[0])
    if reference.network is None and network.info.name.startswith("inception") and size != 2048:
        raise ValueError(f"{chosen.reference} has {size} features, Inception's pool3 2048: another network made it")
    return reference


@dataclasses.dataclass(frozen=True)
class Entry:
    """One column of the result: one set of weights at one guidance scale, or images that are there."""

    name: str
    runs: list[Images]
    """One for each seed range."""
    step: int | None = None
    ema: Any = None
    guidance: float | None = None


def parse_scales(text: str) -> list[float]:
    """ "1,1.5" as guidance scales."""
    try:
        scales = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--guidance {text!r}: numbers with commas, as 1,1.25,1.5") from error
    if len(set(scales)) < len(scales) or not all(np.isfinite(scales)) or min(scales) < 0:
        raise ValueError(f"--guidance {text!r}: each scale once, finite and not negative")
    return scales


def entries_of(chosen: EvaluateArguments, device: torch.device, watch: Watch) -> list[Callable[[], Entry]]:
    """What is to be judged, one after the other; a network is loaded when its turn comes."""
    options, path = chosen.sampling, Path(chosen.samples)
    if not is_model(path):
        if chosen.samples != "digits" and not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; give a folder of images, an npz file, a run, a model, or \"shipped\""
            )
        given = [name for name, unused in (
            ("--repeats", chosen.repeats == 1), ("--every-checkpoint", not chosen.every_checkpoint),
            ("--ema", options.ema is None), ("--guidance", options.guidance == "1"), ("--seed", options.seed == 0),
            ("--sampler", options.sampler is None), ("--steps", options.steps is None),
            ("--autoencoder", options.autoencoder is None)) if not unused]
        if given:
            raise ValueError(f"{chosen.samples} holds images, not a model: {', '.join(given)} cannot change them")
        size = 8
        if chosen.samples == "digits" and chosen.reference.endswith(".npz") and is_statistics(chosen.reference):
            size = (load_statistics(chosen.reference).image_shape or (size,))[0]
        images = open_images(chosen.samples, size, options.num_images)
        return [lambda: Entry(path.stem or chosen.samples, [images])]
    scales = parse_scales(options.guidance)
    count = FIELD_COUNT if options.num_images is None else options.num_images
    if count < 2 or options.seed < 0:
        raise ValueError(f"--num-images {count} must be at least 2 and --seed {options.seed} at least 0")
    candidates = find_candidates(path, options.ema, every=chosen.every_checkpoint)
    if len(scales) > 1 and chosen.every_checkpoint:
        raise ValueError("--every-checkpoint and several --guidance scales are two curves; draw one at a time")
    loaded: dict[Candidate, Sampler] = {}

    def make(candidate: Candidate, scale: float) -> Entry:
        if candidate not in loaded:
            loaded.clear()
            loaded[candidate] = Sampler(candidate, options, device, chosen.batch_size)
        sampler = loaded[candidate]
        first = [options.seed + count * repeat for repeat in range(chosen.repeats)]
        runs: list[Images] = [sampler.images(count, seed, scale, watch) for seed in first]
        name = f"guidance {scale:g}" if len(scales) > 1 else candidate.name
        return Entry(name, runs, candidate.step, candidate.ema, scale)

    return [functools.partial(make, candidate, scale) for candidate in candidates for scale in scales]


def protocol_of(
    entry: Entry, network: FeatureNetwork, reference: Reference, chosen: EvaluateArguments, device: torch.device
) -> dict[str, Any]:
    """All that the figures depend on."""
    images, rows = entry.runs[0], 0 if reference.rows is None else len(reference.rows)
    subset = min(chosen.metrics.kernel_subset, rows or chosen.metrics.kernel_subset, len(images))
    samples = {k: v for k, v in images.facts.items() if k not in ("seeds", "changed")}
    if "seeds" in images.facts:                                                 # which seeds is said below
        samples.pop("fingerprint", None)
    return {
        "distance_name": network.distance_name,
        "network": dataclasses.asdict(network.info),
        "reference": {"name": reference.name, "fingerprint": reference.fingerprint, "count": reference.count,
                      "rows": rows},
        "images": len(images), "image_shape": list(images.shape[:2]), "grey": chosen.grey,
        "settings": {**dataclasses.asdict(chosen.metrics), "kernel_subset": subset},       # as it is, of few images
        "samples": samples, "seeds": [run.facts["seeds"] for run in entry.runs if "seeds" in run.facts],
        "repeats": len(entry.runs),
        "pixels": "127.5 x + 128, clamped, truncated" if "seeds" in images.facts else "as stored",
        "versions": {
            "lamamba": __version__, "torch": torch.__version__, "numpy": np.__version__,
            **{name: metadata.version(name) for name in ("diffusers", "pillow")},
            "python": platform.python_version(),
        },
        "device": device.type,
    }


def judge_entry(
    entry: Entry, network: FeatureNetwork, reference: Reference, protocol: dict[str, Any], work: Path, group: Group,
    chosen: EvaluateArguments, watch: Watch,
) -> dict[str, Any]:
    """Figures of all seed ranges with their mean and spread; found on disk where they were made before a kill."""
    place = work / f"{digest(protocol, [dict(run.facts) for run in entry.runs])[:16]}.entry.json"
    group.wait()                                                                # nobody looks while another writes
    if place.is_file():
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        group.wait()
        return found
    runs: list[Figures] = []
    folders: list[Path] = []
    for number, images in enumerate(entry.runs):
        fitting = fit_channels(
            images, network.info.channels, network.info.name, repeat_grey=chosen.grey == "repeat"
        )
        text = entry.name + (f", repeat {number + 1}" if len(entry.runs) > 1 else "")
        features = collect(fitting, network, work, group, text, chosen, watch)
        statistics = statistics_of(features, group)
        if group.is_main:
            with WorkBar(text, 100, "%") as bar:
                what = ""

                def tell(phase: str, share: float, bar: WorkBar = bar) -> None:
                    nonlocal what
                    if phase != what:
                        bar.begin(phase, 100, "%")
                        what = phase
                    bar(round(100 * share))

                runs.append(judge(
                    features, statistics, reference, chosen.metrics, has_class_logits=network.has_class_logits,
                    on_progress=tell,
                ))
        folders.append(features.folder)
    result: dict[str, Any] = {}
    if group.is_main:
        means, spread = mean_and_spread(runs)
        result = {
            "name": entry.name, "step": entry.step, "ema": entry.ema, "guidance": entry.guidance, "figures": means,
            "spread": spread, "runs": runs, "protocol": protocol,
        }
        place.with_suffix(".tmp").write_text(json.dumps(result), encoding="utf-8")
        os.replace(place.with_suffix(".tmp"), place)
        if not chosen.keep_features:
            for folder in folders:
                shutil.rmtree(folder)
    group.wait()
    return result


def evaluate(chosen: EvaluateArguments) -> None:
    """Judge, print a table, write the result."""
    chosen.metrics.check()
    check_target(chosen.out)
    group, device = Group(), local_device(chosen.device)
    work = chosen.out.with_suffix(".work")
    watch = Watch()
    turns = entries_of(chosen, device, watch)
    network = open_network(chosen.features, chosen.weights, device)
    entries: list[dict[str, Any]] = []
    reference: Reference | None = None
    for turn in turns:
        entry = turn()
        for images in entry.runs:                                               # before any work
            fit_channels(images, network.info.channels, network.info.name, repeat_grey=chosen.grey == "repeat")
        if reference is None:
            reference = open_reference(chosen, entry.runs[0].shape, network, work, group)
        reference.check(network.info, entry.runs[0].shape)
        protocol = protocol_of(entry, network, reference, chosen, device)
        work.mkdir(parents=True, exist_ok=True)
        result = judge_entry(entry, network, reference, protocol, work, group, chosen, watch)
        if group.is_main:
            entries.append(result)
            write_result(chosen.out, entries)
            if len(turns) > 1:
                print(f"{entry.name}: {network.distance_name} {result['figures']['frechet']:.4f}", flush=True)
    if group.is_main:
        print(table(entries))
        print(f"{entries[0]['protocol']['images']:,} images against {reference.name if reference else ''}; "
              f"figures and protocol: {chosen.out}")
        if len(entries) > 1:
            from lamamba.viz.curves import evaluation_curves

            picture = chosen.out.with_suffix(".png")
            evaluation_curves(entries, network.distance_name, picture)
            print(f"curve: {picture}")
        elif chosen.every_checkpoint:
            print("no curve of one checkpoint: lamamba train keeps more with --keep-checkpoints or --keep-every")
        if not chosen.keep_features:
            _clear(work)
    group.wait()
    end_processes()


def _clear(work: Path) -> None:
    """Remove what this command has kept for a restart, and nothing else."""
    for place in work.iterdir():
        if (place / "plan.json").is_file():
            shutil.rmtree(place)
        elif place.name.endswith(".entry.json"):
            place.unlink()
    if not any(work.iterdir()):
        work.rmdir()


def save_statistics(chosen: StatsArguments) -> None:
    """`lamamba evaluate stats`."""
    group, device = Group(), local_device(chosen.device)
    if chosen.out.suffix != ".npz":
        raise ValueError(f"--out {chosen.out} must end in .npz")
    check_target(chosen.out)
    images = open_images(chosen.images, chosen.image_size)
    network = open_network(chosen.features, chosen.weights, device)
    images = fit_channels(
        images, network.info.channels, network.info.name, repeat_grey=chosen.grey == "repeat"
    )
    work = chosen.out.with_suffix(".work")
    reference = reference_of(images, chosen.images, network, work, group, chosen.rows, chosen)
    if group.is_main:
        reference.save(chosen.out)
        _clear(work)
        print(f"{chosen.out}: {len(reference.features[0])} features of {len(images):,} images by {network.info.name}\n"
              f"judge samples by it: lamamba evaluate SAMPLES --reference {chosen.out} --features {chosen.features}")
    group.wait()
    end_processes()
