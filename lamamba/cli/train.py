"""lamamba train: a recipe and its overrides become a run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lamamba.cli.arguments import parse
from lamamba.training.config import TrainConfig, load_recipe, recipe_names

if TYPE_CHECKING:
    from lamamba.data.codec import LatentDecoder
    from lamamba.data.images import ImageSet
    from lamamba.data.sets import TrainingSet
    from lamamba.training.loop import Observer
    from lamamba.training.state import SamplingFacts

DESCRIPTION = f"""Train a network: lamamba train RECIPE [options].

RECIPE is one of {', '.join(recipe_names())}, or a TOML file with the options below (sections as in their names).
Options given here go before the recipe's. Running the same command again resumes the run where it was stopped.

  lamamba train digits --out runs/digits
  lamamba train folder --data.source photos/ --data.image-size 64 --out runs/photos
  lamamba train mine.toml --data.source latents/ --data.image-size 256 --out runs/latents    (see lamamba encode)
  lamamba train digits --steps 200 --optimizer.learning-rate 5e-4 --dry-run"""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainConfig):
    ema_decays: Annotated[tuple[float, ...], tyro.conf.arg(aliases=("--ema-decay",))] = (0.9999,)
    """Weight of the past in the running mean of the weights, constant; short runs need less. One mean is kept for each
    number; the first one is what samples come from."""
    out: Path | None = None
    """Folder of the run; by default runs/RECIPE."""
    dry_run: bool = False
    """Check everything, print the plan, and stop."""


def main(arguments: list[str]) -> None:
    name, rest = "", arguments
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
    if not name and not {"-h", "--help"} & set(rest):
        known = ", ".join(recipe_names())
        raise ValueError(f"name a recipe first, as in lamamba train digits (known: {known}, or a .toml file)")
    recipe = load_recipe(name) if name else TrainConfig()
    default = TrainArguments(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)})
    chosen = parse(TrainArguments, rest, f"train {name or 'RECIPE'}", DESCRIPTION, default)
    config = TrainConfig(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(TrainConfig)})
    out = chosen.out or Path("runs") / Path(name).stem

    from lamamba.training.interrupt import EXIT_INTERRUPTED, Interrupted
    from lamamba.training.processes import MainProcessError, end_processes, is_main_process

    images = open_data(config)
    if chosen.dry_run:
        if is_main_process():
            print_plan(config, images, out)
        return
    try:
        run_training(config, images, out)
    except Interrupted as stop:
        if is_main_process():
            print(stop, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except MainProcessError:                                                    # it says by itself what happened
        sys.exit(2)
    finally:
        end_processes()
    if is_main_process():
        print(f"done: {out}\nsample it: lamamba sample {out} --out grid.png")


def open_data(config: TrainConfig) -> TrainingSet:
    """The data that a configuration names: pixels, latents, or images that are encoded as they are read.

    Raises:
        OSError, ValueError: when it is missing or does not fit.
    """
    from lamamba.data.sets import EncodedSet, PixelSet

    data = config.data
    if data.source == "digits":
        from lamamba.data.digits import Digits

        if data.channels != 1:
            raise ValueError("data.channels=3 does not fit the digits, which are grey; use 1")
        return PixelSet(Digits(data.image_size), data.mirror)
    from lamamba.data.latents import LatentSet, is_latents

    if is_latents(data.source):
        if data.crop != "centre":
            raise ValueError(f"data.crop={data.crop!r} does not fit {data.source}: its latents are of centre crops")
        return LatentSet(
            data.source, mirror=data.mirror, image_size=data.image_size, autoencoder=data.autoencoder
        )
    from lamamba.data.images import Images
    from lamamba.data.manifest import known_bad
    from lamamba.data.sources import open_source

    source = open_source(data.source)
    left_out, note = known_bad(source, data.manifest)
    if note:
        print(f"warning: {note}", flush=True)
    images = Images(
        source, data.image_size, data.channels, crop=data.crop, left_out=left_out, max_bad_images=data.max_bad_images
    )
    if data.autoencoder is None:
        return PixelSet(images, data.mirror)
    from lamamba.data.autoencoder import Autoencoder
    from lamamba.training.processes import local_device

    return EncodedSet(images, Autoencoder(data.autoencoder, local_device(config.device)), data.mirror)


def open_decoder(facts: SamplingFacts) -> LatentDecoder | None:
    """What makes pictures of a network's latents while it trains; None for pixels.

    Raises:
        OSError, ValueError: when the autoencoder cannot be had.
    """
    from lamamba.data.codec import LatentDecoder

    if facts.codec == "pixels" or facts.autoencoder is None:
        return None
    return LatentDecoder(facts.autoencoder, facts)


def run_training(
    config: TrainConfig, images: ImageSet | TrainingSet, out: Path, observers: Sequence[Observer] = ()
) -> Any:
    """Train with a live line and sample grids; returns the final state."""
    from lamamba.cli.observers import ProgressLine, SampleGrid
    from lamamba.training.loop import describe, train
    from lamamba.training.processes import is_main_process
    from lamamba.training.state import RunFolder

    architecture, facts = describe(config, images)
    folder = RunFolder(out)
    sampling, decoder = config.sampling, None
    if not is_main_process():                                                   # the main process draws
        grid = SampleGrid(sampling, folder.samples, facts.label_names)
        return train(config, images, out, [grid, *observers])
    if sampling.every:
        decoder = open_decoder(facts)
    resumed = int(folder.names()[-1].removeprefix("step_")) if folder.names() else 0
    print(f"{out}: {len(images):,} images of {images.name}, {len(facts.label_names) or 'no'} classes, "
          f"{_parameters(architecture):.2f} M parameters", flush=True)
    if resumed:
        print(f"resuming at step {resumed}", flush=True)
    for warning in config.warnings():
        print(f"warning: {warning}", flush=True)
    grid = SampleGrid(sampling, folder.samples, facts.label_names, decoder)
    with ProgressLine(config.steps, resumed) as line:
        return train(config, images, out, [line, grid, *observers])


def _parameters(architecture: Any) -> float:
    from lamamba.benchmark.flops import count

    return count(architecture).parameters / 1e6


def print_plan(config: TrainConfig, images: ImageSet | TrainingSet, out: Path) -> None:
    from lamamba.benchmark.flops import count
    from lamamba.training.loop import describe, pick_device

    architecture, facts = describe(config, images)
    cost = count(architecture)
    print(json.dumps({"train": config.to_dict(), "architecture": architecture.to_dict()}, indent=2))
    weights = cost.parameters * 4 * 5 / 2**30                                   # weights, gradient, two moments, EMA
    epochs = config.steps * config.batch_size / len(images)
    latents = ""
    if facts.codec == "latents":
        shape = " x ".join(map(str, (architecture.in_channels, *architecture.input_size)))
        latents = f", as latents ({shape}) of {facts.autoencoder}"
    activations = cost.activation_bytes * config.batch_size / 2**30
    print(f"""
run folder        {out}
data              {images.name}: {len(images):,} images, {images.image_size} x {images.image_size}{latents}
device            {pick_device(config.device)}
parameters        {cost.parameters / 1e6:.2f} M
multiply-adds     {cost.matrix / 1e9:.3f} G per image and forward pass, and {cost.scan / 1e9:.3f} G of the scan
memory            about {weights:.2f} GiB weights and optimizer, {activations:.2f} GiB activations
run               {config.steps} steps of {config.batch_size}: {epochs:.1f} epochs""")
    for warning in config.warnings():
        print(f"warning: {warning}")
