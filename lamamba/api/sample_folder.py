"""lamamba.sample_folder: any number of images on disk, alone or beside other processes."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamamba.options.base import verb
from lamamba.options.sample_folder import SampleFolderOptions
from lamamba.runs.model import Model
from lamamba.sampling.folder import MakeImages, sample_many
from lamamba.sampling.generate import DEFAULT_BATCH_SIZE
from lamamba.sampling.labels import LabelRule
from lamamba.sampling.plan import NPZ, FileKind, Plan, find_plan
from lamamba.sampling.prepare import fill_from_picture, prepare
from lamamba.sampling.settings import ImageMetadata
from lamamba.sampling.table import find_labels
from lamamba.utils.distributed import is_rank_zero, launched_rank, local_device
from lamamba.utils.progress import ProgressOption, reporting
from lamamba.utils.repeatable import repeatable
from lamamba.utils.text import counted
from lamamba.utils.versions import package_versions

logger = logging.getLogger("lamamba.api")


@dataclass(frozen=True)
class SampleFolderResult:
    """A folder of images, complete and verified."""

    folder: Path
    num: int
    """Number of images."""
    files: FileKind
    """What holds them: "png", "npz" or "both"."""
    manifest: dict[str, Any] = field(repr=False)
    """Plan, machines, versions and hashes, as in manifest.json."""

    @property
    def npz(self) -> Path | None:
        """All images in one file, where there is one."""
        return None if self.files == "png" else self.folder / NPZ

    def __str__(self) -> str:
        what = {"png": "PNG files", "npz": NPZ, "both": f"PNG files and {NPZ}"}[self.files]
        pixels = self.manifest["pixels_sha256"][:12]
        return f"done: {self.folder}, {counted(self.num, 'image')} ({what}), verified; pixels {pixels}"


@verb
def sample_folder(options: SampleFolderOptions, *, progress: ProgressOption = "auto") -> SampleFolderResult:
    """Fill a folder with images, together with any other processes that do the same.

    Image k is a function of the options and of seed + k. Where an earlier call was stopped, the same call goes on.

    Raises:
        FileNotFoundError: when there is no such model.
        FileExistsError: when the folder holds something else.
        ValueError: when options do not fit the model or each other, or the folder holds images made otherwise.
        OSError: when the disk is full or broken; finished shards stay.
    """
    folder = options.out
    options, picture = fill_from_picture(options)
    device = local_device(options.device)
    before = find_plan(folder)                                                  # for batch and threads not given
    threads = 0 if device.type != "cpu" else options.threads or (before and before.threads) or torch.get_num_threads()
    with repeatable(threads):
        plan, make_images = _plan(options, picture, device, before, threads)
        if is_rank_zero():
            _announce(plan, folder)
        with reporting(progress if is_rank_zero() else None) as report:
            manifest = sample_many(
                plan, folder, make_images, rank=launched_rank(), machine=_machine(device), report=report,
            )
    return SampleFolderResult(folder, plan.num, plan.files, manifest)


def _plan(
    options: SampleFolderOptions, picture: ImageMetadata | None, device: torch.device, before: Plan | None,
    threads: int,
) -> tuple[Plan, MakeImages]:
    """The plan, and a function that makes the images of a shard by it."""
    prepared = prepare(options, picture, device)
    model = prepared.model
    rule, classes = _labels(options, model)
    assert options.num is not None
    plan = Plan(
        settings=prepared.settings, num=options.num, seed=options.seed or 0, rule=rule, classes=classes,
        files=options.format or (before.files if before else "png"), threads=threads,
        channels=model.image_channels,
        batch_size=options.batch_size or (before.batch_size if before else DEFAULT_BATCH_SIZE),
    )
    generator = prepared.generator(device, plan.batch_size, plan.classes)

    def make_images(indices: range, advance: Callable[[float], None]) -> np.ndarray:
        return generator(
            plan.labels_of(indices), [plan.seed_of(k) for k in indices],
            on_step=lambda done, total: advance(done / total),
        )

    return plan, make_images


def _labels(options: SampleFolderOptions, model: Model) -> tuple[LabelRule, tuple[int, ...]]:
    """The rule for labels, and the classes that it chooses from.

    Raises:
        ValueError: when there is none, or the model is unconditional.
    """
    if not model.num_classes:
        if options.balanced or options.random_labels or options.classes:
            raise ValueError(
                f"{model.name} is unconditional: it knows no classes, leave balanced, random_labels and classes out"
            )
        return "none", ()
    if not (options.balanced or options.random_labels):
        raise ValueError("say which classes the images shall show: balanced (in turn) or random_labels")
    every = range(model.num_classes)
    classes = every if options.classes is None else find_labels(
        options.classes, model.metadata.label_names, model.num_classes)
    return "balanced" if options.balanced else "random", tuple(classes)


def _announce(plan: Plan, folder: Path) -> None:
    settings = plan.settings
    labels = {"none": "", "balanced": ", classes in turn", "random": ", classes at random"}[plan.rule]
    logger.info(
        f"{folder}: {counted(plan.num, 'image')} of {settings.height} x {settings.width}{labels}, seeds {plan.seed} to "
        f"{plan.seed + plan.num - 1}; {settings.sampler} in {counted(settings.steps, 'step')}, guidance "
        f"{settings.guidance.scale:g}, {counted(plan.num_shards, 'shard')} of {plan.batch_size}"
    )
    needed = plan.npz_bytes * {"png": 0, "npz": 2, "both": 2}[plan.files]
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        logger.warning(f"that takes up to {needed / 2**30:.3g} GiB, and {there} has {free / 2**30:.3g} GiB left")


def _machine(device: torch.device) -> dict[str, str | None]:
    """Device and versions, which may change how results are rounded."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {"device": name, **package_versions("torch", "diffusers", "numpy", "pillow")}
