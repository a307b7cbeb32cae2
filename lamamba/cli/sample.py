"""lamamba sample: a trained network makes a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamamba.cli.arguments import parse
from lamamba.config import unknown_name

DESCRIPTION = """Sample images from a trained network into one PNG.

  lamamba sample runs/digits --classes 3,7 --seed 0 --out grid.png
  lamamba sample runs/photos --num 16 --out sixteen.png               (unconditional)

MODEL is a run folder (its newest checkpoint's averaged weights), a checkpoint, or a model made by lamamba convert. One
row per class, one seed per image: image k is made from seed + k, whatever the batch size."""


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    model: Annotated[Path, tyro.conf.Positional]
    """Run folder, checkpoint, or converted model."""
    out: Path = Path("samples.png")
    """The picture."""
    classes: str | None = None
    """Classes by number or name, with commas; by default the first ten. Not for unconditional models."""
    num: int = 8
    """Images of each class (or in all, for an unconditional model)."""
    seed: int = 0
    """Seed of the first image."""
    sampler: str | None = None
    """ddpm, ddim or dpm++ for noise models, flow-euler or flow-heun for flow models; by default the first that fits."""
    steps: int | None = None
    """Sampling steps; by default the sampler's."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none. By default 2 (1 for unconditional models)."""
    batch_size: int = 64
    """Images at a time; changes speed and memory, not the pictures."""
    autoencoder: str | None = None
    """For models of latents: a diffusers autoencoder, a folder or a hub id such as stabilityai/sd-vae-ft-ema. By
    default the one that made the latents it was trained on."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network (the sampler's own arithmetic stays in float32)."""
    compile: bool = False
    """torch.compile the network first: worth its minute or two for many images, not for a few."""


def parse_classes(text: str | None, label_names: tuple[str, ...], num_classes: int) -> list[int]:
    """ "3,tabby" as labels.

    Raises:
        ValueError: for a number out of range or an unknown name; the nearest is named.
    """
    if text is None:
        return list(range(min(10, num_classes)))
    labels = []
    for word in (part.strip() for part in text.split(",")):
        if word in label_names:
            labels.append(label_names.index(word))
        elif word.lstrip("-").isdigit():
            if not 0 <= int(word) < num_classes:
                raise ValueError(f"class {word} is out of range; this model knows 0 .. {num_classes - 1}")
            labels.append(int(word))
        else:
            raise unknown_name("class", word, label_names or map(str, range(num_classes)))
    return labels


def main(arguments: list[str]) -> None:
    chosen = parse(SampleArguments, arguments, "sample", DESCRIPTION)
    if chosen.num < 1 or chosen.seed < 0:
        raise ValueError(f"--num {chosen.num} must be at least 1 and --seed {chosen.seed} at least 0")

    import torch

    from lamamba.cli.observers import StepBar
    from lamamba.cli.pictures import grid_picture, save_picture
    from lamamba.data.codec import LatentDecoder
    from lamamba.generation import generate
    from lamamba.models.compiling import compile_network
    from lamamba.models.packing import pack_weights
    from lamamba.training.loop import pick_device
    from lamamba.training.state import find_network

    device = pick_device(chosen.device)
    model, facts = find_network(chosen.model)
    config = model.architecture
    if config.num_classes:
        rows = parse_classes(chosen.classes, facts.label_names, config.num_classes)
        labels = [label for label in rows for _ in range(chosen.num)]
        names = [facts.label_names[label] if facts.label_names else str(label) for label in rows]
        columns, count = chosen.num, len(labels)
    else:
        if chosen.classes is not None:
            raise ValueError(f"{chosen.model} is unconditional: it knows no classes, leave --classes out")
        labels, names, count = None, [], chosen.num
        columns = min(count, 8)
    guidance = (2.0 if labels else 1.0) if chosen.guidance is None else chosen.guidance

    decoder = None
    if facts.codec == "latents":
        name = chosen.autoencoder or facts.autoencoder
        if name is None:
            raise ValueError("this model makes latents: name the autoencoder that decodes them with --autoencoder")
        decoder = LatentDecoder(name, facts, device)
        if facts.autoencoder_sha256 not in (None, decoder.autoencoder.sha256):
            print(f"note: trained on latents of {facts.autoencoder}, decoded by another autoencoder: "
                  f"{decoder.autoencoder}")
    elif chosen.autoencoder is not None:
        raise ValueError("this model makes pixels: leave --autoencoder out")

    model = model.to(device, getattr(torch, chosen.dtype))
    if chosen.dtype == "bfloat16" and device.type == "cpu" and not chosen.compile:
        tokens = config.token_grid[0] * config.token_grid[1]
        pack_weights(model, tokens * min(count, chosen.batch_size))
    if chosen.compile:
        compile_network(model)
    with StepBar("sampling") as bar:
        images = generate(
            model, labels, range(chosen.seed, chosen.seed + count), sampler=chosen.sampler,
            num_steps=chosen.steps, guidance=guidance, batch_size=chosen.batch_size, decoder=decoder, on_step=bar,
        )
    save_picture(grid_picture(images, columns, names), chosen.out)
    print(f"{chosen.out}: {count} images, seeds {chosen.seed} to {chosen.seed + count - 1}, guidance {guidance:g}")
