"""What must not change: images by every path, weights, figures and files.

The recorded values are those of the commit before the packages were rearranged. Everything is made through the command
line and names that `lamamba` exports (and `make_scheduler`), so that the same file runs on either side of a change.
`record.py` records.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

import lamamba
from lamamba import LaMambaPipeline, LaMambaUNet, UNetConfig
from lamamba.cli.main import VERBS, main
from lamamba.diffusion.denoise import make_scheduler
from lamamba.pretrained import shipped_model
from tests.autoencoders import make_kl

TESTS = Path(__file__).parents[1]
FLOW_SAMPLERS = ("flow-euler", "flow-heun", "flow-dpm++", "flow-unipc")
TRAINING = (
    "--model.width", "8", "--model.num-heads", "2", "--batch-size", "8", "--checkpoint-every", "3", "--sampling.every",
    "0", "--optimizer.warmup-steps", "0", "--keep-checkpoints", "9", "--device", "cpu",
)


LAST = "checkpoints/step_00000006"
ONE_BLOCK = tuple(
    f"{part}.{i}" for part, count in (
        ("encoder.1", 1), ("encoder.3", 1), ("bottleneck", 1), ("decoder.0", 2), ("decoder.1", 2), ("decoder.2", 2),
        ("decoder.3", 2)) for i in range(count))
"""Blocks to remove so that encoder.0.0 and encoder.2.0 are left: an exporter takes seconds for each."""


def fingerprint() -> str:
    """Hash of what roundings depend on: processor, compiled kernels and libraries; equal ones give equal bits."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    parts = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *re.findall("model name.*", text)[:1]]
    libraries = ("torch", "numpy", "scipy", "diffusers", "pillow")
    parts += [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    for file in sorted((Path(lamamba.__file__).parent / "_native").glob("kernels_*")):
        parts.append(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
    for name, objective, seed, sizes in (
        ("noise", "noise", 1, {"width": 8, "num_heads": 2}), ("flow", "flow", 2, {"width": 32, "num_heads": 4}),
        ("one block", "flow", 3, {"width": 8, "num_heads": 2, "removed_blocks": ONE_BLOCK}),
    ):
        torch.manual_seed(seed)
        config = UNetConfig(
            depths=(1, 1, 1, 1), bottleneck_depth=1, window_size=4, in_channels=1, num_classes=10, grid=8,
            objective=objective, **sizes,                                       # type: ignore[arg-type]
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
    for sampler in ("ddpm", "ddim", "dpm++", "dpm++-sde", "unipc", "euler", "heun"):
        steps = ("--steps", 5) if sampler == "heun" else ()                     # fewer it does not take
        command("sample", folder / "noise", "--sampler", sampler, *common, *steps)
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
        images["sample film"] = np.stack([np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(film)])
    many = folder / "many"
    command("sample", "-n", 7, "--balanced", "--format", "both", "--batch-size", 3, "--steps", 3, "--guidance", 2,
            "--threads", 1, "--out", many)
    images["folder png"] = np.stack([pixels(path) for path in sorted(many.glob("*.png"))])
    with np.load(many / "samples.npz") as archive:
        images["folder npz"], images["folder labels"] = archive["arr_0"][..., 0], archive["arr_1"]
    command("sample", "-n", 3, "--random-labels", "--seed", 4, "--steps", 2, "--guidance", 1.5, "--threads", 1,
            "--out", folder / "random")
    images["folder random labels"] = np.stack([pixels(path) for path in sorted((folder / "random").glob("*.png"))])
    return images


def latent_images(folder: Path) -> dict[str, np.ndarray]:
    """Latents of three images, what an official checkpoint and its conversion there and back hold, and its images."""
    make_kl().save_pretrained(folder / "kl")
    generator = np.random.default_rng(0)
    (folder / "noise pictures").mkdir()
    for k in range(3):
        picture = Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8))
        picture.save(folder / "noise pictures" / f"{k}.png")
    command("encode", folder / "noise pictures", "--autoencoder", folder / "kl", "--image-size", 32, "--out",
            folder / "latents", "--device", "cpu", "--storage", "float32")
    values = {}
    for shard in sorted((folder / "latents").glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            values[f"encode {shard.name} {name}"] = tensor.numpy().reshape(-1)[::7]
    command("convert", TESTS / "parity" / "official_checkpoint.pt", folder / "official")
    command("convert", folder / "official", folder / "back.pt")
    command("convert", folder / "back.pt", folder / "official again")
    values["convert"] = weights(folder / "official")[::97]
    values["convert back"] = weights(folder / "official again")[::97]
    command("sample", folder / "official", "--autoencoder", folder / "kl", "--classes", "0,2", "--num", 1, "--steps", 2,
            "--guidance", 1.5, "--out", folder / "latent.png")
    values["sample latents"] = pixels(folder / "latent.png")
    return values


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
    """Weights of a run, of one that was stopped half way, of one of the version before; images of an old checkpoint."""
    command("train", "digits", *TRAINING, "--steps", 6, "--optimizer.cooldown-share", 0, "--out", folder / "whole")
    command("train", "digits", *TRAINING, "--steps", 3, "--optimizer.cooldown-share", 0, "--out", folder / "resumed")
    command("train", "digits", *TRAINING, "--steps", 6, "--optimizer.cooldown-share", 0, "--out", folder / "resumed")
    values = {
        f"training {name} {part}": weights(folder / name / LAST / part)[::97]
        for name in ("whole", "resumed") for part in ("model", "ema")
    }
    shutil.copytree(TESTS / "training" / "version2" / "run", folder / "version2")    # of the recorded commit
    command("train", "digits", *TRAINING, "--model.width", 4, "--model.num-heads", 1, "--model.depths", 1, 1, 1, 1,
            "--model.bottleneck-depth", 1, "--checkpoint-every", 500, "--keep-checkpoints", 2, "--steps", 4,
            "--optimizer.cooldown-share", 0, "--out", folder / "version2")
    values["training version 2 resumed"] = weights(folder / "version2/checkpoints/step_00000004/model")[::97]
    old = TESTS / "training" / "version1" / "run"
    command("sample", old, "--classes", "1", "--num", 2, "--steps", 2, "--guidance", 1, "--out", folder / "old.png")
    values["sample version 1"] = pixels(folder / "old.png")
    command("sample", old / "checkpoints" / "step_00000002", "--classes", "1", "--num", 2, "--steps", 2,
            "--guidance", 1, "--out", folder / "old.png")
    return {**values, "sample version 1 checkpoint": pixels(folder / "old.png")}


def evaluated(folder: Path) -> dict[str, np.ndarray]:
    """Statistics, and figures of few samples of the shipped model."""
    command("evaluate", "stats", "digits", "--features", "digits", "--out", folder / "digits.npz")
    with np.load(folder / "digits.npz") as archive:
        values = {"statistics mu": archive["mu"], "statistics sigma": archive["sigma"].diagonal()}
    command("evaluate", "shipped", "--reference", folder / "digits.npz", "--features", "digits", "--num-images", 60,
            "--steps", 3, "--out", folder / "figures.json", "--device", "cpu")
    (entry,) = json.loads((folder / "figures.json").read_text())["entries"]
    return {**values, "figures": np.array([entry["figures"][name] for name in sorted(entry["figures"])])}


def onnx_output(folder: Path) -> np.ndarray:
    """Output of an exported graph in onnxruntime."""
    import onnxruntime

    command("export", folder / "one block", folder / "exported onnx", "--onnx", "--images", 0)
    session = onnxruntime.InferenceSession(
        str(folder / "exported onnx" / "onnx" / "unet.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    (output,) = session.run(None, {
        "x": x, "timestep": np.array([0.2, 0.7], np.float32), "class_labels": np.array([3, 10])})
    return output


def all_keys(value: Any, prefix: str = "") -> set[str]:
    """Paths of the keys in nested dictionaries; of a list, those of its first item."""
    if isinstance(value, list):
        return all_keys(value[0], f"{prefix}[]") if value else {prefix}
    if not isinstance(value, dict):
        return {prefix}
    return set().union({prefix}, *(all_keys(inner, f"{prefix}/{key}") for key, inner in value.items()))


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def options(printed: str) -> list[str]:
    """Names of the options in a --help text: of the lines that begin with one."""
    lines = [line.strip(" │") for line in printed.splitlines()]
    return sorted({name for line in lines if line.startswith("-") for name in re.findall(r"--[a-z][\w.-]*\w", line)})


def texts(folder: Path) -> dict[str, Any]:
    """Options of every verb, settings of a PNG, names of files, keys of JSON files, manifests, hashes."""
    found: dict[str, Any] = {}
    more_words = {"train": [["digits"]], "data": [["check"]], "evaluate": [[], ["stats"], ["compare"]]}
    for verb in VERBS:
        for more in more_words.get(verb, [[]]):
            found[f"options {' '.join([verb, *more])}"] = options(command(verb, *more, "--help"))
    for name in ("picture", "again", "latent"):
        with Image.open(folder / f"{name}.png") as picture:
            settings = json.loads(picture.text["lamamba"])                      # type: ignore[attr-defined]
        settings.pop("lamamba")
        found[f"settings of {name}.png"] = settings
    for name in ("exported", "whole", "many", "random", "latents", "official"):
        found[f"files of {name}"] = listing(folder / name)
    for name in ("many", "random"):
        manifest = json.loads((folder / name / "manifest.json").read_text())
        found[f"plan of {name}"], found[f"exact pixels of {name}"] = manifest["plan"], manifest["pixels_sha256"]
    run = folder / "whole"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["keys of metrics.jsonl"] = sorted(set().union(*lines))
    for path in ("config.json", *(f"{LAST}/{name}.json" for name in ("state", "sampling", "manifest"))):
        found[f"keys of {path}"] = sorted(all_keys(json.loads((run / path).read_text())))
    found["keys of latents"] = sorted(set().union(
        *(all_keys(json.loads(path.read_text())) for path in (folder / "latents").glob("*.json"))))
    (entry,) = json.loads((folder / "figures.json").read_text())["entries"]
    found["keys of an evaluation"] = sorted(all_keys(entry))
    for file in ("model/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
        found[f"exact {file}"] = hashlib.sha256((run / LAST / file).read_bytes()).hexdigest()
    found["info s"] = json.loads(command("info", "s", "--image-size", 64, "--json"))
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (9, 9), (label == "cat" and "red") or "blue").save(folder / "photos" / label / "1.png")
    (folder / "photos" / "dog" / "2.png").write_bytes(b"no image")
    command("data", "check", folder / "photos")
    manifest = json.loads((folder / "photos" / "lamamba-manifest.json").read_text())
    found["manifest"] = {key: value for key, value in manifest.items() if key != "source"}
    parity = TESTS / "parity"
    found["parity files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(parity.glob("*.*"))
        if path.suffix != ".md"
    }
    return json.loads(json.dumps(found).replace(str(folder), "FOLDER"))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_all(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every golden array but ONNX's, and every golden text, made anew in a folder."""
    with one_thread():
        small_models(folder)
        arrays = {**sampled_images(folder), **latent_images(folder), **pipeline_images(folder),
                  **training_values(folder), **evaluated(folder)}
        return arrays, texts(folder)
