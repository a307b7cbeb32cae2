"""Half of a diffusers U-Net: score its layers, remove the least missed, heal the rest by distillation (LAPTOP-Diff).

    python examples/compress_unet.py runwayml/stable-diffusion-v1-5 --images photos --remove 0.5 --out half
    accelerate launch examples/compress_unet.py stabilityai/stable-diffusion-xl-base-1.0 --images photos --remove 0.5 \\
        --precision bf16 --batch 4 --accumulate 8 --gradient-checkpointing --out half-xl

The pipeline is any text-conditioned one of diffusers with a UNet2DConditionModel, a folder or hub id. "photos" is a
folder of images with metadata.jsonl or metadata.csv (columns file_name and text), or the name of a dataset. The
pipeline's own autoencoder and text encoders encode them. The same command goes on where it was stopped.

Estimated, not measured, for 10,000 steps of 64 images on A100s in bf16, half of the parameters removed: SD 1.5 at 512
pixels 20 GB (8 images at a time) and 5 hours of one; SDXL at 1,024 pixels 45 GB (4 at a time) and 40 hours of one.

To try it in minutes, on a small pipeline that draws digits: python examples/compress_unet_demo.py

    OUT/scores/scores.json      what each layer is worth; serves any number of budgets
    OUT/plan.json               which go, what that is predicted to cost, and what it costs on other samples
    OUT/pruned, OUT/healed      pipelines; DiffusionPipeline.from_pretrained opens them
    OUT/healing.csv             every term of the loss
    OUT/gallery.png             the same prompts before, pruned and healed
"""

import argparse
import copy
import csv
import dataclasses
import itertools
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from datasets import load_dataset
from diffusers import DiffusionPipeline
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader

from lamamba.compression.additivity import relative_loss
from lamamba.compression.find import find_units
from lamamba.compression.job import score_in_folder
from lamamba.compression.pipeline_calibration import (
    encode_images,
    encode_prompts,
    from_pipeline,
    prediction_channels,
    read_prompts,
    target,
    training_scheduler,
)
from lamamba.compression.pipeline_folder import save_pipeline, unet_sha256
from lamamba.compression.plan import Plan, make_plan
from lamamba.compression.stock_unets import stock_model, stock_units
from lamamba.diffusion.distillation import feature_losses, output_loss
from lamamba.training.draws import image_indices

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pipeline", help="folder or hub id")
    add("--images", required=True, help="folder with metadata.jsonl or metadata.csv, or a dataset's name")
    add("--image-column", default="image")
    add("--caption-column", default="text")
    add("--out", type=Path, required=True)
    add("--remove", type=float, default=0.5, help="share of the U-Net's parameters (0.5)")
    add("--by", choices=("parameters", "multiply-adds"), default="parameters", help="what the share is of")
    add("--stock", action="store_true", help="remove only what configurations of stock diffusers can leave out")
    add("--keep", nargs="*", default=[], help="units that stay, as mid_block")
    add("--samples", type=int, default=256, help="for scoring (256)")
    add("--times", type=float, nargs=2, default=(0, 1000), help="range of timesteps for scoring; high ones decide what "
        "is in a picture")
    add("--steps", type=int, default=10_000, help="of healing (10,000); 0: none")
    add("--batch", type=int, default=8, help="for each device (8)")
    add("--accumulate", type=int, default=1, help="batches to an optimizer step (1)")
    add("--lr", type=float, default=5e-5)
    add("--warmup", type=int, default=100)
    add("--weights", type=float, nargs=3, default=(1, 1, 1), metavar=("TASK", "OUTPUT", "FEATURE"))
    add("--features", choices=("normalised", "plain", "none"), default="normalised")
    add("--ema", type=float, default=0.999, help="highest decay; it rises to it from 0")
    add("--dropout", type=float, default=0.1, help="share of captions left out, for teacher and student alike (0.1)")
    add("--save-every", type=int, default=500)
    add("--precision", choices=DTYPES, default="no", help="of the teacher and of the student's operations")
    add("--gradient-checkpointing", action="store_true")
    add("--workers", type=int, default=2, help="processes that read images")
    add("--prompts", type=Path, help="text file, one a line, for the gallery; by default captions")
    add("--gallery-steps", type=int, default=30)
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 < options.remove < 1:
        parser.error(f"--remove {options.remove:g} must be a share between 0 and 1")
    return options


class WithFeatures(nn.Module):
    """A U-Net that also returns what its down, middle and up blocks do, by name.

    They are outputs of the module that DDP wraps, so that it sees them.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, *args, **inputs):
        unet, found = self.unet, {}
        blocks = {"mid_block": unet.mid_block} if unet.mid_block is not None else {}
        for end in ("down_blocks", "up_blocks"):
            blocks |= {f"{end}.{number}": block for number, block in enumerate(getattr(unet, end))}

        def keep(name):                                                         # down blocks return skips, too
            return lambda _, __, out: found.update({name: out[0] if isinstance(out, tuple) else out})

        handles = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
        try:
            return unet(*args, **inputs).sample, found
        finally:
            for handle in handles:
                handle.remove()


def score_and_plan(options, pipe, folder, data, accelerator) -> Plan:
    """The plan for the budget, measured on samples that no unit was scored on."""
    network = find_units(pipe.unet)
    number = min(len(data), 2 * options.samples)
    images, captions = data[:number][options.image_column], data[:number][options.caption_column]

    def calibration(rows: slice):
        return from_pipeline(
            pipe, images=images[rows], prompts=captions[rows], samples=options.samples, seed=options.seed,
            times=tuple(options.times), batch_size=options.batch,
        )

    teacher = {"teacher": options.pipeline, "teacher_sha256": unet_sha256(folder)}
    scores = score_in_folder(
        network, calibration(slice(0, number // 2)), options.out / "scores", about=teacher,
        rank=accelerator.process_index, report=lambda progress: accelerator.print(
            f"\r{progress.task}: {progress.done} of {progress.total} {progress.unit}", end="", flush=True
        ),
    )
    allowed = stock_units(pipe.unet) if options.stock else None
    plan = make_plan(scores, remove=options.remove, by=options.by, keep=options.keep, allowed=allowed)
    loss = relative_loss(network, plan.removed, calibration(slice(number // 2, None)))
    return dataclasses.replace(plan, measured=loss)


def batches(options, data, first: int, accelerator) -> DataLoader:
    """The batches of this process from its first one on; each pass over the data has an order of its own."""
    rows = [
        image_indices(options.seed, range(start, start + options.batch), len(data))
        for number in range(first, options.steps * options.accumulate)
        for start in [(number * accelerator.num_processes + accelerator.process_index) * options.batch]
    ]
    return DataLoader(data, batch_sampler=[list(map(int, each)) for each in rows], num_workers=options.workers,
                      collate_fn=list)


def terms_of(options, pipe, teacher, model, rows, generator, accelerator) -> dict[str, torch.Tensor]:
    """The terms of the loss, means over the batch: teacher and student see the same noise, times and captions."""
    scheduler, channels, device = training_scheduler(pipe), prediction_channels(pipe), accelerator.device
    x0 = encode_images(pipe, [row[options.image_column] for row in rows]).to(device)
    eps = torch.randn(x0.shape, generator=generator).to(device)
    t = (torch.rand(len(rows), generator=generator) * scheduler.config["num_train_timesteps"]).long().to(device)
    dropped = (torch.rand(len(rows), generator=generator) < options.dropout).tolist()
    texts = ["" if drop else row[options.caption_column] for row, drop in zip(rows, dropped, strict=True)]
    xt, condition = scheduler.add_noise(x0, eps, t), encode_prompts(pipe, texts)
    with torch.no_grad(), accelerator.autocast():
        wanted, wanted_features = teacher(xt, t, **condition)
    output, features = model(xt, t, **condition)
    output, wanted = output[:, :channels], wanted[:, :channels]                 # without a learned variance
    terms = {
        "task": output_loss(output, target(scheduler, x0, eps, t)).mean(), "output": output_loss(output, wanted).mean(),
    }
    if options.features != "none":
        points = [name for name in features if name in wanted_features]         # the stock student may lack mid_block
        by_point = feature_losses(*([found[name] for name in points] for found in (features, wanted_features)),
                                  options.features)
        terms |= {f"feature {name}": losses.mean() for name, losses in zip(points, by_point, strict=True)}
    return terms


def heal(options, pipe, student, data, accelerator) -> nn.Module:
    """Distil the teacher, which is the pipeline's U-Net, into the student; it ends as its average over the steps."""
    teacher, model = WithFeatures(pipe.unet.requires_grad_(False).eval()), WithFeatures(student.train())
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    ema = EMAModel(student.parameters(), decay=options.ema, use_ema_warmup=True, power=3 / 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    rates = get_constant_schedule_with_warmup(optimizer, options.warmup * accelerator.num_processes)
    model, optimizer, rates = accelerator.prepare(model, optimizer, rates)
    accelerator.register_for_checkpointing(ema)
    folder = options.out / "checkpoints"
    done = max((int(path.name[5:]) for path in folder.glob("step_*")), default=0)
    if done:
        accelerator.load_state(folder / f"step_{done}")
        accelerator.print(f"goes on from step {done}")
    ema.to(accelerator.device)
    weights = dict(zip(("task", "output", "feature"), options.weights, strict=True))
    first = done * options.accumulate
    for number, rows in zip(itertools.count(first), batches(options, data, first, accelerator)):
        place = number * accelerator.num_processes + accelerator.process_index
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + place)
        with accelerator.accumulate(model):
            terms = terms_of(options, pipe, teacher, model, rows, generator, accelerator)
            loss = sum(weights[name.split()[0]] * term for name, term in terms.items())
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {done}; lower --lr, or --precision bf16")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            ema.step(student.parameters())
            if done % 10 == 0 or done == options.steps:
                log(options.out / "healing.csv", done, terms, accelerator)
            if done % options.save_every == 0 or done == options.steps:
                save(folder, done, accelerator)
    ema.copy_to(student.parameters())
    return student.eval()


def save(folder: Path, step: int, accelerator) -> None:
    """Write a checkpoint under another name, and remove the one before when it is whole."""
    accelerator.save_state(folder / "unfinished")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = list(folder.glob("step_*"))
        (folder / "unfinished").rename(folder / f"step_{step}")
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def log(path: Path, step: int, terms, accelerator) -> None:
    values = {name: round(accelerator.reduce(term.detach(), "mean").item(), 6) for name, term in terms.items()}
    accelerator.print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    if accelerator.is_main_process:
        is_empty = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_empty:
                writer.writerow(["step", *values])
            writer.writerow([step, *values.values()])


def draw_gallery(path: Path, pipe, networks, prompts, options) -> None:
    """A row of pictures for each network, with the same prompts and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (2 * len(prompts), 2.2 * len(networks))
    figure, axes = plt.subplots(len(networks), len(prompts), figsize=size, squeeze=False, layout="constrained")
    for row, (title, unet) in zip(axes, networks.items(), strict=True):
        pipe.unet = unet.to(pipe.device)
        seeds = [torch.Generator().manual_seed(options.seed + number) for number in range(len(prompts))]
        pictures = [
            pipe(prompt, generator=seed, num_inference_steps=options.gallery_steps).images[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for axis, picture, prompt in zip(row, pictures, prompts, strict=True):
            axis.imshow(picture, cmap="gray")
            axis.set(xticks=[], yticks=[], xlabel=prompt[:40])
        row[0].set_ylabel(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def open_inputs(options: argparse.Namespace):
    """The pipeline's folder, the pipeline and the images, or an end with what is wrong with them."""
    folder, images = Path(options.pipeline), options.images
    try:
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(options.pipeline))
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[options.precision])
    except (AttributeError, OSError, ValueError) as error:
        raise SystemExit(f"{options.pipeline} is no pipeline that diffusers can open: {error}") from error
    source = {"path": "imagefolder", "data_dir": images} if Path(images).is_dir() else {"path": images}
    try:
        return folder, pipe, load_dataset(**source, split="train")
    except (OSError, ValueError) as error:
        raise SystemExit(f"--images {images} cannot be read: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    folder, pipe, data = open_inputs(options)
    accelerator = Accelerator(
        mixed_precision=options.precision, gradient_accumulation_plugin=GradientAccumulationPlugin(options.accumulate),
    )
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    options.out.mkdir(parents=True, exist_ok=True)

    plan, path = score_and_plan(options, pipe, folder, data, accelerator), options.out / "plan.json"
    accelerator.print(f"\n{plan}")
    if path.exists() and Plan.load(path).removed != plan.removed:
        raise SystemExit(f"{path} removes other units; give another --out, or the options of before")
    make = stock_model if options.stock else lambda unet, names: find_units(unet).without(names)
    pruned = make(pipe.unet, plan.removed)
    if accelerator.is_main_process and not (options.out / "pruned").exists():
        plan.save(path)
        save_pipeline(folder, options.out / "pruned", pruned, plan)
    accelerator.wait_for_everyone()
    networks = {"before": pipe.unet, f"{plan.parameters:.0%} removed": pruned}
    if options.steps:
        student = copy.deepcopy(pruned).float().to(accelerator.device)            # weights of its own, float32
        healed = heal(options, pipe, student, data, accelerator).to(DTYPES[options.precision])
        networks["healed"] = healed
        if accelerator.is_main_process and not (options.out / "healed").exists():
            note = f"Healed in {options.steps} steps by distillation; the losses below were measured before."
            save_pipeline(folder, options.out / "healed", healed, plan, note=note)
    if accelerator.is_main_process:
        prompts = read_prompts(options.prompts) if options.prompts else data[:10][options.caption_column]
        draw_gallery(options.out / "gallery.png", pipe, networks, prompts[:10], options)


if __name__ == "__main__":
    main()
