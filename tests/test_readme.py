"""What the README shows can be typed as it stands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lamamba
from lamamba.cli.main import main
from lamamba.models.official import to_official
from lamamba.pretrained import shipped_model
from tests.networks import random_network, small_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)   # all, so that they pair up
    return [text for found, text in fences if found == kind]


def test_the_library_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, *_ = blocks("python")
    names: dict = {}
    exec(example, names)
    assert names["output"].shape == (2, 8, 32, 32)
    assert names["model"]._run_grid == (32, 48)


def test_the_example_of_calls_runs(tmp_path, monkeypatch):
    """Training, sampling and evaluation from Python, with fewer steps and images."""
    monkeypatch.chdir(tmp_path)
    _, example, _ = blocks("python")
    shorter = {"steps=900": "steps=4", "num=8": "num=8, steps=2", "num_images=2000": "num_images=8, steps=2"}
    for long, short in shorter.items():
        assert long in example
        example = example.replace(long, short)
    names: dict = {}
    exec(example, names)
    assert names["run"].folder.is_dir()
    assert names["picture"].images.shape == (16, 8, 8, 1)
    assert (tmp_path / "grid.png").exists()
    assert (tmp_path / "figures.json").exists()


def test_the_diffusers_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(shipped_model()), "exported/digits", "--images", "0"]) == 0
    *_, example = blocks("python")
    names: dict = {}
    exec(example + "\nlast = pipe('3', num_inference_steps=2, height=8, width=16).images[0]", names)
    assert len(names["pictures"]) == 2
    assert names["last"].size == (16, 8)


COMMANDS = [
    line.split("#")[0].strip() for block in blocks("") for line in block.splitlines() if line.startswith("lamamba ")
]


SHORTER = "--steps 2"
HERE = {
    "train digits --out": "--steps 6 --batch-size 16 --sampling.every 6 --checkpoint-every 6",
    "train digits --dry-run": "--out runs/planned",
    "train folder": "--steps 2 --batch-size 2 --sampling.every 2 --model.width 16 --model.num-heads 2",
    "sample runs/photos": SHORTER,
    "data check imagenet/train": "",
    "train xl_256 --dry-run": "",
    "plot": "",
    "sample --out digits.png": SHORTER,
    "sample --fast": "-n 2",
    "sample --cache": "--steps 6 -n 2",
    "sample runs/digits --classes 3,7": SHORTER,
    "sample --like": "",
    "sample runs/digits --interpolate": SHORTER,
    "sample runs/digits --classes 0,1,2": SHORTER,
    "sample runs/digits -n": "--steps 1 --batch-size 500",
    "export": "--images 1 --steps 2",
    "evaluate shipped": "--steps 1 --num-images 16",
    "evaluate runs/digits": "--steps 1 --num-images 16",
    "evaluate compare": "",
    "convert official.pt": "",
    "convert models/xl": "",
    "compress shipped": "--samples 16",
}
"""Commands that run here, in this order, by how they begin; with words that shorten them."""
ELSEWHERE = {
    "app": "serves until it is stopped: tests/app", "data check latents": "of latents that need a hub's autoencoder",
    "encode": "an autoencoder of a hub", "train xl_256 --out": "latents, and days", "train finetune": "latents",
    "train digits --score.every": "a training of minutes: tests/cli/test_train.py",
    "evaluate samples.npz": "weights of Inception", "evaluate stats": "weights of Inception",
    "sample models/xl": "an autoencoder of a hub", "compress runs/xl": "a network of a long training",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    for name in ("photos/cats", "photos/dogs", "imagenet/train/n01440764", "imagenet/train/n01443537"):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            pixels = random.integers(0, 256, (72, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    torch.save({"ema": to_official(random_network(small_config(grid=(32, 32), window_size=8)))}, folder / "official.pt")
    return folder


@pytest.mark.docs
def test_every_command_that_can_run_here_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    for command in COMMANDS:
        words = command.removeprefix("lamamba ")
        (start, extra), *more = [item for item in HERE.items() if words.startswith(item[0])] or [(None, "")]
        assert not more
        if start is None:
            assert any(words.startswith(known) for known in ELSEWHERE), f"say in this file whether it runs: {command}"
            continue
        if start == "plot":
            for name in ("runs/a", "runs/b"):
                shutil.copytree("runs/digits", name)
        if start == "evaluate compare":
            for name in ("a.json", "b.json"):
                shutil.copy("sweep.json", name)
        assert main(shlex.split(f"{words} {extra}")) == 0, command


@pytest.mark.docs
def test_every_line_of_python_runs(tmp_path, monkeypatch):
    """Of the docs' blocks, and the calls within sentences."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(shipped_model()), "exported/digits", "--images", "0"]) == 0
    shutil.copytree(shipped_model(), tmp_path / "runs" / "digits")
    for call in re.findall(r"`((?:DiffusionPipeline|LaMambaPipeline)\.[^`]+\))`", README):
        code = f"from diffusers import DiffusionPipeline; from lamamba import LaMambaPipeline; pipe = {call}"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    blocks_of_docs = [
        block for page in sorted((ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]
    for block in blocks_of_docs:
        if "(...)" not in block:                                                # not a form
            exec(block, {"lamamba": lamamba, "torch": torch})


def test_commands_are_found():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_exists(command, monkeypatch):
    """The words after the verb are parsed by the verb's own parser, up to the point where work would begin."""
    import importlib

    from lamamba.cli import parse as arguments

    class Parsed(Exception):
        pass

    verb, *words = shlex.split(command)[1:]
    module = importlib.import_module(f"lamamba.cli.{verb}")

    def parse_and_stop(*given, **named):
        arguments.parse(*given, **named)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse_and_stop)
    with pytest.raises(Parsed):
        module.main(words)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_files_that_the_pages_name_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"(?:lamamba|docs|tests|benchmarks|examples)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert ((ROOT / page).parent / picture).exists(), picture
