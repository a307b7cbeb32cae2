"""lamamba train as users start it: the plan of every recipe, launchers, a stop with its status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamamba.data.digits import Digits
from lamamba.evaluation import frechet_distance
from lamamba.metrics.digits_network import DigitFeatures
from lamamba.runs.folder import RunFolder
from lamamba.runs.model import open_network
from lamamba.sampling import generate
from lamamba.training.interrupt import EXIT_INTERRUPTED, stop_signals
from tests.cli.test_commands import TINY
from tests.data.test_images import write_images
from tests.training.together import command, command_on, free_port, needs_fork_server, read_lines


def test_a_number_of_devices_is_for_plans(tmp_path):
    process = command(tmp_path, "train", "digits", "--world-size", 4)
    process.join(60)
    assert process.exitcode == 2
    assert "--world-size is for --dry-run" in (tmp_path / "printed.txt").read_text(encoding="utf-8")


EXPECTED = {
    "xl_256": ("652.48 M", "5,004.6 steps per epoch"), "b_256": ("105.31 M", "256 images = 1 process x 1 x 256"),
    "s_256": ("26.71 M", "79.9 epochs"), "digits": ("8 x 8",),
}
"""The others are checked by tests/options/test_training.py; a plan of a large network takes seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("b_256", "s_256") else ()) for name in EXPECTED])
def test_every_recipe_prints_its_plan_without_its_data(lamamba, tmp_path, name):
    status, out, err = lamamba("train", name, "--dry-run")
    assert status == 0, err
    for words in ("parameters", "memory            about", "steps per epoch", "learning rate", *EXPECTED[name]):
        assert words in out
    assert not list(tmp_path.iterdir())
    assert "warning" not in out


def test_an_option_mends_a_clash_in_a_recipe(lamamba, tmp_path):
    (tmp_path / "mine.toml").write_text(
        "keep_every = 700\nbatch_size = 1\n[optimizer]\nschedule = 'cosine'\ncooldown_share = 0.5\n"
        "[data]\nimage_size = 8\n"
        "[model]\nwidth = 8\nnum_heads = 1\ndepths = [1, 1, 1, 1]\nbottleneck_depth = 1")
    status, _, err = lamamba("train", "mine.toml", "--keep-every", 0)
    assert (status, "optimizer: cooldown_share is for constant schedules" in err) == (2, True)
    status, _, err = lamamba(
        "train", "mine.toml", "--keep-every", 0, "--optimizer.cooldown-share", 0, "--data.source", "nowhere")
    assert (status, "nowhere" in err, "cooldown" in err) == (2, True, False)


def test_a_recipe_whose_data_is_missing_says_so(lamamba):
    status, _, err = lamamba("train", "s_256")
    assert (status, "latents/imagenet_256" in err) == (2, True)


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lamamba"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m",
                   "lamamba"],                                                  # --cpu would start one process only
}
SCORED = ["train", "digits", *TINY, "--out", "run", "--sampling.every", "3", "--sampling.num-steps", "2",
          "--score.every", "3", "--score.features", "digits", "--score.images", "20", "--score.reference", "digits"]


def assert_two_trained(printed: str, run: Path) -> None:
    assert printed.count("done: ") == 1                                         # of rank 0
    events = read_lines(run, "events.jsonl")
    assert (events[0]["processes"], events[-1]["event"]) == (2, "finished")
    assert (run / "samples" / "step_00000003.png").is_file()
    assert len(read_lines(run, "scores.jsonl")) == 1


@needs_fork_server
def test_each_process_of_a_group_runs_the_same_command(tmp_path):
    assert_two_trained("".join(command_on(2, tmp_path, *SCORED)), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_the_same_command_unchanged(launcher, tmp_path):
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], *SCORED], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_two_trained(done.stdout, tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_with_a_checkpoint_and_a_status_of_its_own(name, lamamba, tmp_path):
    train = ["train", "digits", *TINY, "--out", "run"]
    process = command(tmp_path, *train, "--steps", "1000000", "--log-every", "1")
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, getattr(signal, name))
    process.join(60)
    complaint = (tmp_path / "printed.txt").read_text()
    assert process.exitcode == EXIT_INTERRUPTED == 75
    assert f"{name}: stopped after step" in complaint
    assert "run the same command again to resume" in complaint
    assert ("once more stops at once" in complaint) == (name == "SIGINT")
    newest = RunFolder(tmp_path / "run").newest()
    assert newest.name in complaint
    _, resumed, _ = lamamba(*train, "--steps", int(newest.name[5:]) + 1)
    assert f"resuming at step {int(newest.name[5:])}" in resumed


@pytest.fixture
def minded_interrupts():
    """Ctrl-C as Python has it, even where the tests run behind a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_does_not_wait(minded_interrupts):
    with pytest.raises(KeyboardInterrupt), stop_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.name == "SIGINT"
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):                                      # as before: this process lives on
        signal.raise_signal(signal.SIGINT)


def test_a_check_in_the_middle_of_a_run_changes_none_of_its_images(lamamba, tmp_path):
    """The bad files that it finds no longer count, and the run that never heard of it is the same to the bit."""
    write_images(tmp_path / "photos", 6)
    for bad in ("000.png", "003.png"):
        (tmp_path / "photos" / bad).write_bytes(b"")
    training = ["train", "folder", "--data.source", "photos", "--data.image-size", 16, "--data.channels", 3, *TINY]
    assert lamamba(*training, "--steps", 6, "--out", "whole")[0] == 0
    assert lamamba(*training, "--steps", 2, "--out", "checked")[0] == 0
    assert "bad       2" in lamamba("data", "check", "photos")[1]
    status, out, err = lamamba(*training, "--steps", 6, "--data.max-bad-images", 0, "--out", "checked")
    assert status == 0, err
    assert "2 files that the manifest names now" in out
    assert "checked: 6 images of photos" in out
    whole, checked = (open_network(run, "none")[0].state_dict() for run in ("whole", "checked"))
    assert all(torch.equal(whole[name], checked[name]) for name in whole)
    status, out, err = lamamba(*training, "--steps", 2, "--data.max-bad-images", 0, "--out", "later")
    assert (status, "later: 4 images of photos" in out) == (0, True), err       # a new run leaves them out
    os.remove(tmp_path / "photos" / "lamamba-manifest.json")
    status, out, err = lamamba(*training, "--steps", 4, "--data.max-bad-images", 0, "--out", "later")
    assert (status, "later: 4 images of photos" in out) == (0, True), err       # so does its restart without a manifest


def test_quick_scores_while_training_are_written_and_drawn(lamamba, tmp_path):
    scoring = ["--score.every", 2, "--score.features", "digits", "--score.images", 20, "--sampling.num-steps", 2]
    status, out, err = lamamba("train", "digits", *TINY, *scoring, "--score.reference", "digits", "--out", "run")
    assert status == 0, err
    lines = read_lines(tmp_path / "run", "scores.jsonl")
    assert [(line["step"], line["name"], line["images"]) for line in lines] == [(k, "FD-digits", 20) for k in (2, 3)]
    network = open_network(tmp_path / "run")[0]
    images = generate(network, [k % 10 for k in range(20)], range(20), num_steps=2, guidance=1.75)
    moments = []
    for pictures in (images, Digits().images.transpose(0, 2, 3, 1)):
        features = DigitFeatures()(pictures)["features"].astype(np.float64)
        moments += [features.mean(axis=0), np.cov(features, rowvar=False)]
    assert lines[-1]["score"] == pytest.approx(frechet_distance(*moments), rel=1e-4)
    assert f"FD-digits {lines[-1]['score']:.4g} of 20 images" in out
    assert lamamba("plot", "run", "--out", "scored.png")[0] == 0
    (tmp_path / "run" / "scores.jsonl").unlink()
    assert lamamba("plot", "run", "--out", "plain.png")[0] == 0
    assert Image.open("scored.png").height > Image.open("plain.png").height     # a panel more
    status, _, err = lamamba("train", "digits", *TINY, *scoring, "--out", "other")
    assert (status, "score.reference=None must be statistics" in err) == (2, True)
