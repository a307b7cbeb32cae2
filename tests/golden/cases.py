"""What must not change: images by every path, figures and files, made through the command line and the pipeline.

    python -m tests.golden.cases RECORD_FOLDER        records golden.npz and golden.json anew

The values were recorded before the packages were rearranged. Only the command line and names exported by `lamamba` are
used, so that the same file runs on either side of a change.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from lamamba import LaMambaPipeline, LaMambaUNet, UNetConfig
from lamamba.cli.main import VERBS, main
from lamamba.diffusion.denoise import make_scheduler
from lamamba.pretrained import shipped_model

FLOW_SAMPLERS = ("flow-euler", "flow-heun", "flow-dpm++", "flow-unipc")
TRAINING = (
    "--model.width", "8", "--model.num-heads", "2", "--batch-size", "8", "--checkpoint-every", "3", "--sampling.every",
    "0", "--optimizer.warmup-steps", "0", "--keep-checkpoints", "9", "--device", "cpu",
)


def command(*words: object) -> str:
    """Run a command in this process; what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = end.code or 0
    assert status == 0, (words, output.getvalue())
    return output.getvalue()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))[..., 0]


def small_models(folder: Path) -> None:
    """A noise model with random weights, and a second one to guide by."""
    for name, objective, seed in (("noise", "noise", 1), ("flow", "flow", 2)):
        torch.manual_seed(seed)
        config = UNetConfig(
            width=32 if name == "flow" else 8, num_heads=4 if name == "flow" else 2, depths=(1, 1, 1, 1),
            bottleneck_depth=1, window_size=4, in_channels=1, num_classes=10, grid=8, objective=objective,
        )
        model = LaMambaUNet(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder / name)
        metadata = {"codec": "pixels", "objective": objective, "image_size": 8, "scale": 1.0, "version": 1,
                    "label_names": list("0123456789")}
        (folder / name / "sampling.json").write_text(json.dumps(metadata))


def sampled_images(folder: Path) -> dict[str, np.ndarray]:
    """Pictures, a film, a folder of images."""
    out = folder / "picture.png"
    common = ("--classes", "3,7", "--num", 2, "--seed", 5, "--steps", 4, "--guidance", 2, "--out", out)
    images = {}
    for sampler in FLOW_SAMPLERS:
        command("sample", "--sampler", sampler, *common)
        images[f"sample {sampler}"] = pixels(out)
    for sampler in ("ddpm", "ddim", "dpm++", "unipc"):
        command("sample", folder / "noise", "--sampler", sampler, *common)
        images[f"sample {sampler}"] = pixels(out)
    for name, words in {
        "guidance": ("--guidance-interval", 0.1, 0.8, "--guidance-rescale", 0.5, "--guidance-channels", "first-three"),
        "autoguidance": ("--autoguidance", folder / "flow"),
        "size": ("--height", 8, "--width", 16),
        "interpolate seeds": ("--interpolate", "seeds:3:7"),
    }.items():
        command("sample", *common, *words)
        images[f"sample {name}"] = pixels(out)
    command("sample", "--interpolate", "classes:3:8", "--num", 3, "--steps", 4, "--guidance", 2, "--out", out)
    images["sample interpolate classes"] = pixels(out)
    command("sample", *common[:-1], out)
    command("sample", "--like", out, "--out", folder / "again.png")
    images["sample like"] = pixels(folder / "again.png")
    command("sample", "--classes", 3, "--num", 2, "--steps", 3, "--guidance", 2, "--out", folder / "film.gif")
    with Image.open(folder / "film.gif") as film:
        images["sample film"] = np.asarray(film.convert("L"))
    many = folder / "many"
    command("sample", "-n", 7, "--balanced", "--format", "both", "--batch-size", 3, "--steps", 3, "--guidance", 2,
            "--threads", 1, "--out", many)
    images["folder png"] = np.stack([pixels(path) for path in sorted(many.glob("*.png"))])
    with np.load(many / "samples.npz") as archive:
        images["folder npz"], images["folder labels"] = archive["arr_0"][..., 0], archive["arr_1"]
    return images


def pipeline_images(folder: Path) -> dict[str, np.ndarray]:
    """An exported folder: called, from an image, inpainting, with the small model's scheduler swapped."""
    command("export", shipped_model(), folder / "exported", "--images", 0)
    pipe = LaMambaPipeline.from_pretrained(folder / "exported")
    pipe.set_progress_bar_config(disable=True)

    def call(**options: Any) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe(["3", 8], num_inference_steps=5, guidance_scale=2.0, generator=generators, output_type="np",
                    **options).images

    plain = call()
    start, mask = torch.from_numpy(plain.transpose(0, 3, 1, 2)), torch.zeros(1, 1, 8, 8)
    mask[:, :, 4:] = 1
    images = {"pipeline": plain, "pipeline image": call(image=start, strength=0.6),
              "pipeline inpainting": call(image=start, mask_image=mask)}
    pipe.scheduler = make_scheduler("flow-unipc", "flow")
    images["pipeline unipc"] = call()
    return {name: np.round(255 * array[..., 0]).astype(np.uint8) for name, array in images.items()}


def weights(folder: Path) -> np.ndarray:
    """All weights of a saved network, one after the other."""
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    return np.concatenate([state[name].flatten().numpy() for name in sorted(state)])


def training_values(folder: Path) -> dict[str, np.ndarray]:
    """Weights of a run of six steps, and of one that was stopped after three; what an old checkpoint samples."""
    command("train", "digits", *TRAINING, "--steps", 6, "--optimizer.cooldown-share", 0, "--out", folder / "whole")
    command("train", "digits", *TRAINING, "--steps", 3, "--optimizer.cooldown-share", 0, "--out", folder / "resumed")
    command("train", "digits", *TRAINING, "--steps", 6, "--optimizer.cooldown-share", 0, "--out", folder / "resumed")
    last = "checkpoints/step_00000006"
    values = {
        f"training {name} {part}": weights(folder / name / last / part)[::97]
        for name in ("whole", "resumed") for part in ("model", "ema")
    }
    old = Path(__file__).parents[1] / "training" / "version1" / "run"
    command("sample", old, "--classes", "1", "--num", 2, "--steps", 2, "--guidance", 1, "--out", folder / "old.png")
    return {**values, "sample version 1": pixels(folder / "old.png")}


def evaluated(folder: Path) -> dict[str, np.ndarray]:
    """Statistics, and figures of few samples of the shipped model."""
    command("evaluate", "stats", "digits", "--features", "digits", "--out", folder / "digits.npz")
    with np.load(folder / "digits.npz") as archive:
        values = {"statistics mu": archive["mu"], "statistics sigma": archive["sigma"].diagonal()}
    command("evaluate", "shipped", "--reference", folder / "digits.npz", "--features", "digits", "--num-images", 60,
            "--steps", 3, "--out", folder / "figures.json", "--device", "cpu")
    (entry,) = json.loads((folder / "figures.json").read_text())["entries"]
    return {**values, "figures": np.array([entry["figures"][name] for name in sorted(entry["figures"])])}


def texts(folder: Path) -> dict[str, Any]:
    """Options of every verb, settings of a PNG, names of files, a manifest."""
    found: dict[str, Any] = {}
    for verb, words in {verb: [verb] for verb in VERBS}.items():
        for more in {"train": [["digits"]], "data": [["check"]], "evaluate": [[], ["stats"]]}.get(verb, [[]]):
            printed = command(*words, *more, "--help")
            found[f"options {' '.join([*words, *more])}"] = sorted(set(re.findall(r"--[a-z][\w.-]*", printed)))
    with Image.open(folder / "picture.png") as picture:
        settings = json.loads(picture.text["lamamba"])                          # type: ignore[attr-defined]
    settings.pop("lamamba")
    found["png settings"] = settings
    found["exported files"] = sorted(
        path.relative_to(folder / "exported").as_posix() for path in (folder / "exported").rglob("*.*"))
    found["manifest plan"] = json.loads((folder / "many" / "manifest.json").read_text())["plan"]
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (9, 9), (label == "cat" and "red") or "blue").save(folder / "photos" / label / "1.png")
    (folder / "photos" / "dog" / "2.png").write_bytes(b"no image")
    command("data", "check", folder / "photos")
    manifest = json.loads((folder / "photos" / "lamamba-manifest.json").read_text())
    found["manifest"] = {key: value for key, value in manifest.items() if key != "source"}
    parity = Path(__file__).parents[1] / "parity"
    found["parity files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(parity.glob("*.*"))
        if path.suffix != ".md"
    }
    return found


def make_all(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every golden array and every golden text, made anew in a folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small_models(folder)
        arrays = {**sampled_images(folder), **pipeline_images(folder), **training_values(folder), **evaluated(folder)}
        return arrays, texts(folder)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        made, said = make_all(Path(work))
    place = Path(sys.argv[1])
    np.savez_compressed(place / "golden.npz", **made)                           # type: ignore[arg-type]
    (place / "golden.json").write_text(json.dumps(said, indent=1) + "\n")
