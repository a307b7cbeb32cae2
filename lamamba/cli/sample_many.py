"""The part of lamamba sample that fills a folder, alone or beside other processes."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import PIL
import torch

from lamamba._version import __version__
from lamamba.cli.sample import SampleArguments, prepare, to_device
from lamamba.data.codec import PixelCodec
from lamamba.sampling import generate
from lamamba.sampling.folder import sample_many
from lamamba.sampling.labels import LabelRule
from lamamba.sampling.plan import NPZ, Plan, find_plan
from lamamba.sampling.table import parse_classes
from lamamba.utils.distributed import is_main_process, local_device
from lamamba.utils.progress import reporting

if TYPE_CHECKING:
    from lamamba.runs.model import OpenModel
    from lamamba.sampling.settings import ImageMetadata

DEFAULT_BATCH = 64


def sample_many_images(chosen: SampleArguments, facts: ImageMetadata | None) -> None:
    """Fill a folder as asked, and say so."""
    if chosen.num is None:
        raise ValueError("say how many images the folder shall hold: --num 50000")
    folder, speaks = chosen.out or Path("samples"), is_main_process()
    device = local_device(chosen.device)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True       # the same bits every time
    before = find_plan(folder)                                                  # its batch and threads, if not told
    threads = 0 if device.type != "cpu" else chosen.threads or (before and before.threads) or torch.get_num_threads()
    torch.set_num_threads(threads or torch.get_num_threads())
    model, guiding_model, settings = prepare(chosen, facts, device, speaks)
    rule, classes = _labels(chosen, model)
    channels = 3 if model.decoder else model.network.architecture.in_channels
    plan = Plan(
        settings=settings, num=chosen.num, seed=chosen.seed or 0, rule=rule, classes=classes,
        files=chosen.format or (before.files if before else "png"), threads=threads, channels=channels,
        batch_size=chosen.batch_size or (before.batch_size if before else DEFAULT_BATCH),
    )
    if speaks:
        _announce(plan, folder)
    guiding_model = to_device(model, guiding_model, settings, device, plan.batch_size)
    decoder, input_size = model.decoder or PixelCodec(), model.fit(settings.height, settings.width)[0]

    def make_images(places: range, tell: Callable[[float], None]) -> np.ndarray:
        return generate(
            model.network, plan.labels_of(places), [plan.seed_of(k) for k in places], sampler=settings.sampler,
            num_steps=settings.steps, guidance=settings.guidance, guiding_model=guiding_model, input_size=input_size,
            batch_size=plan.batch_size, decoder=decoder, on_step=lambda done, total: tell(done / total),
        )

    with reporting("auto" if speaks else None) as report:
        manifest = sample_many(
            plan, folder, make_images, rank=int(os.environ.get("RANK", "0")), machine=_machine(device), report=report,
        )
    if speaks:
        what = {"png": "PNG files", "npz": NPZ, "both": f"PNG files and {NPZ}"}[plan.files]
        print(f"done: {folder}, {plan.num:,} images ({what}), verified; pixels {manifest['pixels_sha256'][:12]}")


def _labels(chosen: SampleArguments, model: OpenModel) -> tuple[LabelRule, tuple[int, ...]]:
    """The rule, and the classes to choose from.

    Raises:
        ValueError: when there is none, or the model knows no classes.
    """
    if not model.num_classes:
        if chosen.balanced or chosen.random_labels or chosen.classes:
            raise ValueError(
                f"{model.name} is unconditional: it knows no classes, leave --balanced, --random-labels and --classes "
                "out"
            )
        return "none", ()
    if not (chosen.balanced or chosen.random_labels):
        raise ValueError("say which classes the images shall show: --balanced (in turn) or --random-labels")
    every = range(model.num_classes)
    classes = every if chosen.classes is None else parse_classes(
        chosen.classes, model.facts.label_names, model.num_classes)
    return "balanced" if chosen.balanced else "random", tuple(classes)


def _announce(plan: Plan, folder: Path) -> None:
    settings = plan.settings
    labels = {"none": "", "balanced": ", classes in turn", "random": ", classes at random"}[plan.rule]
    print(
        f"{folder}: {plan.num:,} images of {settings.height} x {settings.width}{labels}, seeds {plan.seed} to "
        f"{plan.seed + plan.num - 1}; {settings.sampler} in {settings.steps} steps, guidance "
        f"{settings.guidance.scale:g}, {plan.num_shards} shards of {plan.batch_size}", flush=True,
    )
    needed = plan.npz_bytes * {"png": 0, "npz": 2, "both": 2}[plan.files]
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        print(f"warning: that takes up to {needed / 2**30:.3g} GiB, and {there} has {free / 2**30:.3g} GiB left",
              flush=True)


def _machine(device: torch.device) -> dict[str, str]:
    """What may make a rounding differ."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {
        "device": name, "lamamba": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "numpy": np.__version__, "pillow": PIL.__version__, "python": platform.python_version(),
    }
