"""The whole way of a user through the command line: check, encode, train on two processes, kill, resume, sample."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw

from lamamba.cli.main import main
from lamamba.data.latents import LatentSet
from lamamba.runs.folder import RunFolder
from tests.autoencoders import make_kl
from tests.cli.test_commands import TINY
from tests.files import hashes
from tests.training.together import command_on, losses_of, read_lines

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals")

TRAINING = [
    "train", "folder", "--data.source", "latents", "--data.image-size", "32", "--data.mirror", *TINY,
    "--batch-size", "6", "--checkpoint-every", "10", "--keep-checkpoints", "9", "--steps", "60",
    "--watch.held-out", "4", "--sampling.every", "30", "--sampling.num-steps", "2", "--sampling.per-class", "2",
]


def call(place, *arguments, status=0):
    """Run lamamba in a folder; what it printed, warnings and errors too."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        patch.chdir(place)
        assert main(list(map(str, arguments))) == status, told.getvalue()
    return told.getvalue()


def torchrun(place, *arguments):
    """`torchrun ... lamamba ARGUMENTS` on two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lamamba"]
    return subprocess.Popen([*command, *map(str, arguments)], cwd=place, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Handwritten digits as PNG and drawn shapes as JPEG, one of them cut off; and a small autoencoder."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("whole")
    for name in ("digit", "shape"):
        (folder / "images" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k, digit in enumerate(load_digits().images[:20]):
        picture = Image.fromarray((digit * 15).astype(np.uint8)).resize((40, 36))
        picture.save(folder / "images" / "digit" / f"{k:02}.png")
        ground, colour = (tuple(rng.integers(0, 256, 3).tolist()) for _ in range(2))
        picture = Image.new("RGB", (48, 40), ground)
        draw, (x, y) = ImageDraw.Draw(picture), rng.integers(2, 20, 2).tolist()
        (draw.ellipse if k % 2 else draw.rectangle)((x, y, x + 18, y + 14), fill=colour)
        picture.save(folder / "images" / "shape" / f"{k:02}.jpg")
    whole = (folder / "images" / "shape" / "00.jpg").read_bytes()
    (folder / "images" / "shape" / "99.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "later").mkdir()
    make_kl().save_pretrained(folder / "kl")
    return folder


@pytest.fixture(scope="module")
def latents(place):
    told = call(place, "data", "check", "images")
    assert "2 classes with 20 to 21 files" in told
    assert "shape/99.jpg: truncated" in told
    assert "1 subfolder without images" in told
    encoding = ["encode", "images", "--autoencoder", "kl", "--image-size", "32", "--shard-size", "8"]
    encoding += ["--out", "latents"]
    assert "40 images in 5 verified shards" in command_on(2, place, *encoding)[0]
    assert "5 shards, all as they were written" in call(place, "data", "check", "latents")
    return encoding


def content(run):
    """Hash of every file of a run's last checkpoint, but for what tells of the processes' own history."""
    found = hashes(RunFolder(run).newest())
    return {name: digest for name, digest in found.items() if name.endswith(".safetensors")}


@pytest.mark.slow
def test_check_encode_train_on_two_processes_kill_resume_sample(place, latents):
    printed, _ = torchrun(place, *TRAINING, "--out", "whole").communicate()
    process = torchrun(place, *TRAINING, "--out", "killed")
    while len(RunFolder(place / "killed").names()) < 2 and process.poll() is None:
        time.sleep(0.01)
    for one in (process, *psutil.Process(process.pid).children(recursive=True)):   # torchrun's are no process group
        one.kill()
    process.communicate()
    assert 0 < len(RunFolder(place / "killed").names()) < 6, printed
    printed, _ = torchrun(place, *TRAINING, "--out", "killed").communicate()
    assert "resuming at step" in printed
    assert content(place / "killed") == content(place / "whole")                # to the bit
    assert len(content(place / "whole")) == 3                                   # weights, average, optimizer
    last = [read_lines(place / run)[-1] for run in ("whole", "killed")]
    assert last[0]["loss"] == last[1]["loss"]
    assert last[0]["held_out_loss"] == last[1]["held_out_loss"]
    with Image.open(place / "killed" / "samples" / "step_00000060.png") as one, \
            Image.open(place / "whole" / "samples" / "step_00000060.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))

    told = call(place, "sample", "killed", "--classes", "digit,shape", "--num", 3, "--steps", 2, "--out", "grid.png")
    assert "6 images" in told
    with Image.open(place / "grid.png") as grid:
        assert len(np.unique(np.asarray(grid))) > 10                            # a picture, not a blank


def test_images_are_encoded_as_they_are_read_when_an_autoencoder_is_named(place, latents):
    """From the very same latents, to what float16 keeps of them."""
    call(place, *TRAINING, "--data.source", "images", "--data.autoencoder", "kl", "--steps", 3, "--out", "live")
    call(place, *TRAINING, "--steps", 3, "--out", "stored")
    np.testing.assert_allclose(losses_of(place / "live"), losses_of(place / "stored"), rtol=1e-3)


def test_a_truncated_shard_is_named_and_encoding_again_mends_it(place, latents):
    data, shard = LatentSet(place / "latents"), place / "latents" / "shard_00002.safetensors"
    before = data.moments(range(len(data)))
    os.truncate(shard, shard.stat().st_size - 100)
    told = call(place, *TRAINING, "--out", "never", status=2)
    assert "shard_00002.safetensors has" in told
    assert "Run the same lamamba encode command again" in told
    assert "shard_00002" in call(place, "data", "check", "latents", status=2)
    call(place, *latents)
    assert torch.equal(LatentSet(place / "latents").moments(range(len(data))), before)
