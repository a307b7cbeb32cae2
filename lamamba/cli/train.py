"""lamamba train: a recipe and its overrides become a run."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lamamba.cli.parse import parse
from lamamba.config import LATENT_SCALE
from lamamba.options.training import DataOptions, TrainConfig, load_recipe, recipe_names

if TYPE_CHECKING:
    import torch

    from lamamba.data.codec import LatentDecoder
    from lamamba.data.images import ImageSet
    from lamamba.data.sets import TrainingSet
    from lamamba.runs.metadata import ModelMetadata
    from lamamba.training.loop import Callback

DESCRIPTION = f"""Train a network: lamamba train RECIPE [options].

RECIPE is one of {', '.join(recipe_names())}, or a TOML file with the options below (sections as in their names).
Options given here go before the recipe's. Running the same command again resumes the run where it was stopped.

  lamamba train digits --out runs/digits
  lamamba train folder --data.source photos/ --data.image-size 64 --out runs/photos
  lamamba train mine.toml --data.source latents/ --data.image-size 256 --out runs/latents    (see lamamba encode)
  lamamba train digits --steps 200 --optimizer.learning-rate 5e-4 --dry-run"""


LATENT_CHANNELS = 4
"""Of the Stable Diffusion autoencoders, whose latents the paper's recipes train on."""


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

    from lamamba.runs.folder import RunFolder
    from lamamba.utils.distributed import end_processes, is_main_process

    if chosen.dry_run:
        if is_main_process():
            print_plan(config, plan_data(config), out)
        return
    try:
        run_training(config, open_data(config, out), out)
    finally:
        end_processes()
    if is_main_process():
        if (bad := RunFolder(out).bad_images).is_file():
            count = len(bad.read_text(encoding="utf-8").splitlines())
            print(f"{count} files could not be read, others stood in: {bad}")
        print(f"done: {out}\nsample it: lamamba sample {out} --out grid.png")


def open_data(config: TrainConfig, out: Path | None = None) -> TrainingSet:
    """The data that a configuration names: pixels, latents, or images that are encoded as they are read.

    Args:
        config: of the run.
        out: the run's folder: where unforeseen bad images are written down, by all processes together, and which files
            a run that goes on has left out from its beginning.

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

    if data.kind == "latents" or is_latents(data.source):
        if data.kind == "images":
            raise ValueError(f"{data.source} holds latents, and data.kind='images'; leave data.kind out")
        if data.crop != "centre":
            raise ValueError(f"data.crop={data.crop!r} does not fit {data.source}: its latents are of centre crops")
        return LatentSet(
            data.source, mirror=data.mirror, image_size=data.image_size, autoencoder=data.autoencoder
        )
    from lamamba.data.images import Images
    from lamamba.data.manifest import excluded_files
    from lamamba.data.sources import open_source
    from lamamba.runs.folder import RunFolder
    from lamamba.utils.distributed import is_main_process, local_device

    source = open_source(data.source)
    left_out, note = excluded_files(source, data.manifest)
    foreseen: set[str] = set()
    if out is not None and (began_without := RunFolder(out).left_out()) is not None:
        left_out, foreseen = began_without, set(left_out) - set(began_without)
    if note and is_main_process():
        print(f"warning: {note}", flush=True)
    if foreseen and is_main_process():
        print(f"{len(foreseen)} files that the manifest names now were not known to be bad when this run began: its "
              "order stays, and where they cannot be read the next good ones stand in", flush=True)
    images = Images(
        source, data.image_size, data.channels, crop=data.crop, excluded=left_out, newly_excluded=foreseen,
        max_bad_images=data.max_bad_images, bad_files=None if out is None else RunFolder(out).bad_images,
    )
    if data.autoencoder is None:
        return PixelSet(images, data.mirror)
    from lamamba.data.autoencoder import Autoencoder

    return EncodedSet(images, Autoencoder(data.autoencoder, local_device(config.device)), data.mirror)


def plan_data(config: TrainConfig) -> TrainingSet:
    """The data for a plan: what a recipe says of it stands in for data that is not there yet.

    Raises:
        OSError, ValueError: when the data does not fit, or is missing and the recipe does not say what it would be.
    """
    data = config.data
    if data.expected_images is None or Path(data.source).exists():
        return open_data(config)
    return PlannedData(data)


class PlannedData:
    """Data that is not there: how much of it there will be, and of what shape."""

    def __init__(self, data: DataOptions):
        from lamamba.data.codec import CodecConfig

        is_latent = data.kind == "latents" or data.autoencoder is not None
        self.name = f"{data.source} (not read; as the recipe says)"
        self.image_size = data.image_size
        self.input_size = data.image_size // LATENT_SCALE if is_latent else data.image_size
        self.channels = LATENT_CHANNELS if is_latent else data.channels
        self.codec, self.draws_latents = CodecConfig(codec="latents" if is_latent else "pixels"), is_latent
        self.label_names = tuple(str(label) for label in range(data.expected_classes or 0))
        self.fingerprint = ""
        self._count = data.expected_images or 0

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int], draws: Any) -> Any:
        raise ValueError(f"{self.name} cannot be trained on")

    def files(self, indices: Sequence[int]) -> list[str]:
        raise ValueError(f"{self.name} has no files")


def open_decoder(facts: ModelMetadata, device: torch.device) -> LatentDecoder | None:
    """What makes pictures of a network's latents while it trains, on the device that trains; None for pixels.

    Raises:
        OSError, ValueError: when the autoencoder cannot be had.
    """
    from lamamba.data.codec import LatentDecoder

    if facts.codec == "pixels" or facts.autoencoder is None:
        return None
    try:
        return LatentDecoder(facts.autoencoder, facts, device)
    except OSError as error:
        raise OSError(
            f"{error}. It is wanted for pictures while training: name where it is with --data.autoencoder, or train "
            "without them (--sampling.every 0)"
        ) from error


def run_training(
    config: TrainConfig, images: ImageSet | TrainingSet, out: Path, callbacks: Sequence[Callback] = ()
) -> Any:
    """Train with a live line and sample grids; returns the final state.

    Exits with status 75 when a signal has stopped the run, and with 2 where the main process has said why it failed.
    """
    from lamamba.training.interrupt import EXIT_INTERRUPTED, Interrupted
    from lamamba.utils.distributed import MainProcessError, is_main_process

    try:
        return _train_and_tell(config, images, out, callbacks)
    except Interrupted as stop:
        if is_main_process():
            print(stop, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except MainProcessError:                                                    # it says by itself what happened
        sys.exit(2)


def _train_and_tell(
    config: TrainConfig, images: ImageSet | TrainingSet, out: Path, callbacks: Sequence[Callback]
) -> Any:
    from lamamba.cli.callbacks import ProgressLine, SampleGrid
    from lamamba.runs.folder import RunFolder
    from lamamba.training.loop import describe, train
    from lamamba.utils.distributed import is_main_process, local_device

    architecture, facts = describe(config, images)
    folder = RunFolder(out)
    sampling, decoder = config.sampling, None
    is_main, device = is_main_process(), local_device(config.device)
    if is_main and (sampling.every or config.score.every):
        decoder = open_decoder(facts, device)
    if config.score.every:
        from lamamba.evaluation.quick_score import QuickScore

        score = QuickScore(config.score, sampling, folder.scores, facts.image_size, decoder, device, judges=is_main)
        callbacks = [score, *callbacks]
    if not is_main:                                                             # the main process draws
        grid = SampleGrid(sampling, folder.samples, facts.label_names)
        return train(config, images, out, [grid, *callbacks])
    resumed = int(folder.names()[-1].removeprefix("step_")) if folder.names() else 0
    print(f"{out}: {len(images):,} images of {images.name}, {len(facts.label_names) or 'no'} classes, "
          f"{_parameters(architecture):.2f} M parameters", flush=True)
    if resumed:
        print(f"resuming at step {resumed}", flush=True)
    for warning in config.warnings():
        print(f"warning: {warning}", flush=True)
    grid = SampleGrid(sampling, folder.samples, facts.label_names, decoder)
    with ProgressLine(config.steps, resumed) as line:
        return train(config, images, out, [line, grid, *callbacks])


def _parameters(architecture: Any) -> float:
    from lamamba.benchmarking.flops import count

    return count(architecture).parameters / 1e6


def print_plan(config: TrainConfig, data: ImageSet | TrainingSet, out: Path) -> None:
    """What a run would be: network, cost, memory, speed of passing the data, and the learning rate as a curve."""
    from lamamba.benchmarking.flops import count
    from lamamba.benchmarking.memory import training_memory
    from lamamba.training.loop import describe
    from lamamba.utils.distributed import launched_processes, pick_device

    architecture, facts = describe(config, data)
    cost, processes, options = count(architecture), launched_processes(), config.processes
    share = math.ceil(math.ceil(config.batch_size / processes) / options.accumulation_steps)
    memory = training_memory(
        architecture, share, num_averages=len(config.ema_decays), processes=processes,
        sharded=options.sharding == "full", bfloat16=config.precision.autocast == "bfloat16",
        checkpoint_activations=options.checkpoint_activations, accumulates=options.accumulation_steps > 1,
    )
    print(json.dumps({"train": config.to_dict(), "architecture": architecture.to_dict()}, indent=2))
    per_epoch = len(data) / config.batch_size
    group = "1 process" if processes == 1 else f"{processes} processes"
    latents = ""
    if facts.codec == "latents":
        shape = " x ".join(map(str, (architecture.in_channels, *architecture.input_size)))
        latents = f", as latents ({shape}) of {facts.autoencoder or 'an autoencoder'}"
    print(f"""
run folder        {out}
data              {data.name}: {len(data):,} images, {data.image_size} x {data.image_size}{latents}
device            {pick_device(config.device)}, {group}
parameters        {cost.parameters / 1e6:.2f} M
multiply-adds     {cost.matrix / 1e9:.3f} G per image and forward pass, and {cost.scan / 1e9:.3f} G of the scan
memory            about {memory.peak / 2**30:.2f} GiB on each device: {memory.state / 2**30:.2f} weights, averages and \
optimizer, {memory.step / 2**30:.2f} for a step of {share} image{'s' if share > 1 else ''} at a time
step              {config.batch_size} images = {group} x {options.accumulation_steps} x {share}
run               {config.steps:,} steps, {per_epoch:,.1f} steps per epoch: {config.steps / per_epoch:,.1f} epochs

{rate_curve(config)}""")
    for warning in config.warnings():
        print(f"warning: {warning}")


CURVE_WIDTH, CURVE_HEIGHT = 64, 6


def rate_curve(config: TrainConfig) -> str:
    """The learning rate over the run, drawn with characters."""
    steps = [round(column * (config.steps - 1) / (CURVE_WIDTH - 1)) for column in range(CURVE_WIDTH)]
    rates = [config.learning_rate_at(step) for step in steps]
    top = max(rates)
    rows = []
    for row in range(CURVE_HEIGHT, 0, -1):
        marks = "".join("#" if rate > top * (row - 0.5) / CURVE_HEIGHT else " " for rate in rates)
        label = f"{top:.1e}" if row == CURVE_HEIGHT else ""
        rows.append(f"{label:>16}  |{marks}".rstrip())
    last = f"{config.steps:,}"
    rows.append(f"{'0':>16}  +{'-' * CURVE_WIDTH}")
    rows.append(f"{'learning rate':>16}   0{'steps':^{CURVE_WIDTH - 1 - len(last)}}{last}")
    return "\n".join(rows)
