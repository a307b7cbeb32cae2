"""lamamba sample: a trained network makes one picture, a film, or as many images as one likes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from lamamba.cli.parse import parse
from lamamba.options.sampling import SamplerOptions

if TYPE_CHECKING:
    import torch

    from lamamba.runs.model import Model
    from lamamba.sampling.settings import ImageMetadata
    from lamamba.sampling.table import Asked

DESCRIPTION = """Sample images from a trained network.

  lamamba sample runs/digits --classes 3,7 --seed 0 --out grid.png             one row per class, one seed per image
  lamamba sample --like grid.png --steps 10 --out again.png                    as that picture was made, but for ...
  lamamba sample runs/digits --out denoising.gif                               a film of the way from noise (or .mp4)
  lamamba sample runs/digits --interpolate seeds:3:7 --classes 2 --out path.png      (or classes:3:8; or a film)
  lamamba sample runs/xl --num 50000 --random-labels --format npz --out samples/     by any number of processes:
  torchrun --nproc-per-node 8 -m lamamba sample runs/xl -n 50000 --random-labels --format npz --out samples/

MODEL is a run folder (its newest checkpoint's averaged weights), a checkpoint, or a saved model; without it, the small
digits model that ships with the package. Image k is made from seed + k, whatever the batch size and whoever makes it.
Every PNG carries its settings. A folder of images goes on where it was when the same command is started again."""


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    model: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder, checkpoint, or saved model; by default the digits model that ships with the package."""
    out: Path | None = None
    """A picture (.png), a film (.gif, .mp4), or a folder for many images. By default samples.png, or samples/ with
    --balanced or --random-labels."""
    like: Path | None = None
    """A PNG made by lamamba: whatever is not said here is done as it was done there."""
    classes: str | None = None
    """Classes by number or name, with commas; by default the first ten (for many images: all). Not for unconditional
    models."""
    num: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Images of each class (or in all, for an unconditional model); in a folder, in all. By default 8. (torchrun would
    take --num for an option of its own: write -n there.)"""
    seed: int | None = None
    """Seed of the first image; by default 0."""
    interpolate: str | None = None
    """seeds:A:B or classes:A:B: --num images on the way from one seed to another, or from one class to another."""
    balanced: bool = False
    """Many images, into a folder: the classes in turn."""
    random_labels: bool = False
    """Many images, into a folder: each with a class drawn from its own seed, as for the published scores."""
    format: Literal["png", "npz", "both"] | None = None
    """Of many images: a PNG each (the default), one uint8 npz (arr_0: N x H x W x 3, arr_1: labels), or both. The npz
    alone takes twice its size while it is put together."""
    sampler: str | None = None
    """ddpm, ddim, dpm++, dpm++-sde, unipc, euler or heun for noise and v models; flow-euler, flow-heun, flow-dpm++ or
    flow-unipc for flow models. By default the first."""
    steps: int | None = None
    """Sampling steps; by default the sampler's."""
    guidance: float | None = None
    """Guidance scale; 1 is none. By default 2 (1 for unconditional models)."""
    guidance_channels: Literal["all", "first-three"] | None = None
    """Guide all channels (the paper's code, and the default) or the first three (DiT's)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these times, 0 (clean) to 1 (noise)."""
    guidance_rescale: float | None = None
    """0 (off) to 1: how much of the contrast that guidance adds is taken back."""
    autoguidance: Path | None = None
    """A guiding model (smaller, or an earlier checkpoint) in place of the model without labels (autoguidance)."""
    height: int | None = None
    """Of an image in pixels; by default as in training."""
    width: int | None = None
    """Of an image in pixels; by default as in training."""
    batch_size: int | None = None
    """Images at a time; changes speed and memory, and a pixel by at most one grey level. By default 64."""
    threads: int | None = None
    """On a CPU, cores for each process of many; by default all (under torchrun, one)."""
    fps: float = 12
    """Frames of a film in a second."""
    autoencoder: str | None = None
    """For models of latents: a diffusers autoencoder, a folder or a hub id such as stabilityai/sd-vae-ft-ema. By
    default the one that made the latents it was trained on."""
    device: str = "auto"
    """"auto" (a GPU where there is one; under torchrun each process its own), or a PyTorch device."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the network, by default float32 (the sampler's own arithmetic always is)."""
    compile: bool = False
    """torch.compile the network first: worth its minute or two for many images, not for a few."""

    @property
    def is_many(self) -> bool:
        """Whether a folder of images is asked for."""
        is_folder = self.out is not None and not self.out.suffix
        return bool(self.balanced or self.random_labels or self.format or is_folder)


def main(arguments: list[str]) -> None:
    chosen = parse(SampleArguments, arguments, "sample", DESCRIPTION)
    _check(chosen)
    if chosen.is_many:
        from lamamba.api.sample_folder import sample_folder
        from lamamba.options.sample_folder import SampleFolderOptions
        from lamamba.utils.distributed import is_main_process

        result = sample_folder(_as(SampleFolderOptions, chosen, out=chosen.out or Path("samples")))
        if is_main_process():
            print(result)
        return
    facts = None
    if chosen.like is not None:
        from lamamba.sampling.prepare import as_in_picture
        from lamamba.sampling.settings import read_png_facts

        facts = read_png_facts(chosen.like)
        filled = as_in_picture(_as(SamplerOptions, chosen), facts)
        chosen = replace(chosen, **{entry.name: getattr(filled, entry.name) for entry in fields(filled)})
    _sample_picture(chosen, facts)


T = TypeVar("T", bound=SamplerOptions)


def _as(cls: type[T], chosen: SampleArguments, **changes: Any) -> T:
    """The options of another class, from those of the same names."""
    return cls(**{entry.name: getattr(chosen, entry.name) for entry in fields(cls)} | changes)


def _check(chosen: SampleArguments) -> None:
    for name, low in {"num": 1, "seed": 0, "batch_size": 1, "threads": 1}.items():
        if (number := getattr(chosen, name)) is not None and number < low:
            raise ValueError(f"--{name.replace('_', '-')} {number} must be at least {low}")
    if not 0 < chosen.fps <= 50:
        raise ValueError(f"--fps {chosen.fps:g} must lie between 0 and 50")
    if chosen.balanced and chosen.random_labels:
        raise ValueError("--balanced and --random-labels exclude each other: choose one")
    suffix = "" if chosen.out is None else chosen.out.suffix.lower()
    if chosen.is_many:
        if suffix in (".png", ".gif", ".mp4"):
            raise ValueError(f"many images go into a folder, and --out {chosen.out} is a file: give a folder's name")
        if chosen.interpolate:
            raise ValueError("--interpolate makes a picture or a film: give --out with .png, .gif or .mp4")
    elif suffix not in ("", ".png", ".gif", ".mp4"):
        raise ValueError(f"--out {chosen.out}: pictures are .png, films .gif or .mp4, many images go into a folder")


def _sample_picture(chosen: SampleArguments, facts: ImageMetadata | None) -> None:
    import numpy as np

    from lamamba.cli.callbacks import StepBar
    from lamamba.data.codec import PixelCodec
    from lamamba.diffusion.denoise import make_scheduler
    from lamamba.sampling import generate
    from lamamba.sampling.prepare import prepare, to_device
    from lamamba.sampling.settings import ImageMetadata, png_text
    from lamamba.utils.distributed import pick_device
    from lamamba.utils.files import check_target
    from lamamba.viz.films import FILM_SUFFIXES, check_film, chosen_frames, save_film
    from lamamba.viz.grids import bare_picture, grid_picture, save_picture

    out = chosen.out or Path("samples.png")
    check_target(out)
    is_film = out.suffix.lower() in FILM_SUFFIXES
    if is_film:
        check_film(out)
    device = pick_device(chosen.device)
    model, guiding_model, settings = prepare(_as(SamplerOptions, chosen), facts, device)
    asked = _asked(chosen, facts, model)
    count, batch_size = len(asked.seeds), chosen.batch_size or 64
    guiding_model = to_device(model, guiding_model, settings, device, min(count, batch_size))
    decoder = model.decoder or PixelCodec()
    walks = is_film and chosen.interpolate is None                              # else the path itself is the film
    evaluations = len(make_scheduler(settings.sampler, model.network.architecture.objective, settings.steps).timesteps)
    frames: dict[int, list[np.ndarray]] = {step: [] for step in chosen_frames(evaluations)} if walks else {}

    def keep_frame(batch: range, step: int, x0: torch.Tensor) -> None:
        if step in frames:
            frames[step].append(decoder.decode(x0))

    with StepBar("sampling") as bar:
        images = generate(
            model.network, asked.labels, asked.seeds, sampler=settings.sampler, num_steps=settings.steps,
            guidance=settings.guidance, guiding_model=guiding_model,
            input_size=model.fit(settings.height, settings.width)[0], batch_size=batch_size, decoder=decoder,
            on_step=bar, preview=keep_frame if walks else None,
        )
    if is_film:
        tables = [np.concatenate(parts) for parts in frames.values()] if walks else list(
            images.reshape(-1, asked.columns, *images.shape[1:]).swapaxes(0, 1))
        columns = asked.columns or 1 if walks else 1
        save_film([grid_picture(table, columns, asked.row_names) for table in tables], out, chosen.fps)
        print(f"{out}: a film of {len(tables)} pictures")
        return
    made = ImageMetadata(
        settings=settings, seeds=asked.seeds, labels=asked.labels, columns=asked.columns, row_names=asked.row_names,
        batch_size=batch_size,
    )
    picture = grid_picture(images, asked.columns, asked.row_names) if asked.columns else bare_picture(images[0])
    save_picture(picture, out, png_text(made))
    print(f"{out}: {count} images, {_seeds_in_words(asked)}, {settings.sampler} in {settings.steps} steps, "
          f"guidance {settings.guidance.scale:g}")


def _asked(chosen: SampleArguments, facts: ImageMetadata | None, model: Model) -> Asked:
    """Which images: as the picture to be repeated shows, where nothing else is said."""
    from lamamba.sampling.table import DEFAULT_COLUMNS, as_before, path_between, table

    if facts is not None and all(v is None for v in (chosen.classes, chosen.num, chosen.seed, chosen.interpolate)):
        return as_before(facts)
    before = _before(facts) if facts is not None else {}
    num = chosen.num or before.get("num") or DEFAULT_COLUMNS
    seed = before.get("seed", 0) if chosen.seed is None else chosen.seed
    given: Any = chosen.classes.split(",") if isinstance(chosen.classes, str) else chosen.classes
    classes = before.get("classes") if given is None else given
    if chosen.interpolate:
        return path_between(model, chosen.interpolate, given, num, seed)
    return table(model, classes, num, seed)


def _before(facts: ImageMetadata) -> dict[str, Any]:
    """A picture's classes, seed and columns, where it is a table of them.

    Raises:
        ValueError: when it shows a path between seeds or classes.
    """
    from lamamba.sampling.settings import Interpolated

    if any(isinstance(place, Interpolated) for place in (*facts.seeds, *(facts.labels or ()))):
        raise ValueError("that picture shows a path: give --interpolate again with other seeds, classes or numbers")
    rows = facts.labels[:: facts.columns or 1] if facts.labels else ()
    return {
        "classes": rows or None, "seed": facts.seeds[0],
        "num": facts.columns or 1 if facts.labels else len(facts.seeds),
    }


def _seeds_in_words(asked: Asked) -> str:
    if all(isinstance(seed, int) for seed in asked.seeds):
        first, last = min(asked.seeds), max(asked.seeds)                        # type: ignore[type-var]
        return f"seeds {first} to {last}"
    return "on the way from one seed to another"
