"""The commands as a user types them: help that teaches, work that is done, mistakes answered in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lamamba.cli.main import VERBS, main
from tests import networks
from tests.data.test_images import write_images
from tests.networks import PARITY, largest_difference
from tests.training.together import read_lines

TINY = [
    "--model.width", "8", "--model.num-heads", "2", "--model.depths", "1", "1", "1", "1",
    "--model.bottleneck-depth", "1", "--model.removed-blocks", ",".join(networks.TINY["removed_blocks"]),
    "--steps", "3", "--batch-size", "4", "--ema-decays", "0.1", "--sampling.every", "0", "--device", "cpu",
]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lamamba.cli.main", *map(str, arguments)], capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    sampling = ["--sampling.every", "3", "--sampling.num-steps", "2"]
    assert main(["train", "digits", *TINY, *sampling, "--out", str(out)]) == 0
    return out


def test_help_answers_at_once():
    run("--help")                                                               # the first start fills disk caches
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = run("--help")
        times.append(time.perf_counter() - began)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    imports = run("--version", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}).stderr
    assert "torch" not in imports
    assert min(times) < 2                                                       # half a second where nothing else runs


def test_a_reader_that_stops_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m lamamba --help | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("lamamba")
    assert done.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(lamamba, verb):
    status, out, _ = lamamba(verb, "--help")
    assert status == 0
    assert f"lamamba {verb}" in out
    assert "default:" in out or verb == "convert"
    assert "None" not in out                                                    # an option may be left out


def test_training_leaves_a_run_that_samples(trained, lamamba, tmp_path):
    assert read_lines(trained)[-1]["step"] == 3
    assert Image.open(trained / "samples" / "step_00000003.png").size[0] > 100
    command = ["sample", trained, "--classes", "3,7", "--num", 5, "--seed", 1, "--steps", 2]
    status, out, _ = lamamba(*command, "--out", "g.png")
    assert status == 0
    assert "10 images, seeds 1 to 10" in out
    picture = np.asarray(Image.open(tmp_path / "g.png"))
    assert (picture.shape[0], picture.ndim) == (2 * (48 + 6) + 6, 3)
    lamamba(*command, "--batch-size", 3, "--out", "h.png")
    again = np.asarray(Image.open(tmp_path / "h.png"))
    assert largest_difference(again, picture) <= 2                              # one grey level, enlarged
    assert lamamba(*command, "--dtype", "bfloat16", "--out", "half.png")[0] == 0
    half = np.asarray(Image.open(tmp_path / "half.png"))
    assert np.abs(half.astype(int) - picture.astype(int)).mean() < 10


def test_the_same_command_again_goes_on(trained, lamamba):
    status, out, _ = lamamba("train", "digits", *TINY, "--out", trained, "--steps", 4)
    assert status == 0
    assert "resuming at step 3" in out
    assert read_lines(trained)[-1]["step"] == 4


def test_a_dry_run_prints_the_plan_and_touches_nothing(lamamba, tmp_path):
    status, out, _ = lamamba("train", "digits", "--dry-run", "--ema-decay", "0.9999")
    assert status == 0
    for words in ("parameters", "multiply-adds", "epochs", "width 32", "warning: after 900 steps"):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_ones_own_folder(lamamba, tmp_path):
    write_images(tmp_path / "pets" / "cat", 2)
    write_images(tmp_path / "pets" / "dog", 2)
    data = ["--data.source", "pets", "--data.image-size", 16]
    status, out, err = lamamba("train", "folder", *data, *TINY, "--out", "run")
    assert status == 0, err
    assert "2 classes" in out
    status, out, err = lamamba("sample", "run", "--classes", "dog", "--num", 2, "--steps", 2)
    assert status == 0, err
    status, _, err = lamamba("sample", "run", "--classes", "dgo")
    assert (status, "did you mean 'dog'" in err) == (2, True)


def test_info(lamamba):
    _, out, _ = lamamba("info", "xl", "--image-size", 256, "--state-size", 16)
    assert "50.47 G" in out
    small, large = (json.loads(lamamba("info", "s", "--image-size", side, "--json")[1]) for side in (256, 512))
    assert small["parameters"] == 26708256
    assert 3.9 * small["matrix"] < large["matrix"] < 4.1 * small["matrix"]


def test_convert_there_and_back(lamamba, tmp_path):
    import torch

    from lamamba.models.official import read_official

    checkpoint = PARITY / "official_checkpoint.pt"
    status, out, err = lamamba("convert", checkpoint, "model")
    assert (status, err) == (0, "")
    assert "window 8, state size 1, continuous scan" in out
    assert lamamba("info", "model")[0] == 0
    assert lamamba("convert", "model", "back.pt")[0] == 0
    assert b"back.pt" not in (tmp_path / "back.pt").read_bytes()                # nor any other name of this disk
    original, back = read_official(checkpoint)["ema"], read_official(tmp_path / "back.pt")["ema"]
    assert original.keys() == back.keys()
    assert all(torch.equal(original[key].to(back[key].dtype), back[key]) for key in back)
    status, _, err = lamamba("sample", "model")
    assert (status, "autoencoder" in err) == (2, True)
    torch.save(original, "bare.pt")
    assert "warning: the scan kind cannot be known" in lamamba("convert", "bare.pt", "bare")[2]


def test_the_demo_from_start_to_report(lamamba, tmp_path):
    status, out, err = lamamba("demo", "--steps", 2, "--per-digit", 10, "--out", "d")
    assert status == 0, err
    assert "recognised as requested" in out
    assert {path.name for path in (tmp_path / "d").iterdir()} == {
        "run", "digits.png", "real.png", "loss.png", "one-step.png", "report.md", "report.json",
    }
    assert json.loads((tmp_path / "d" / "report.json").read_text())["score"]["asked"] == 100


MISTAKES = [
    (["smaple"], "verb 'smaple' is unknown; did you mean 'sample'?"),
    (["train"], "name a recipe first"),
    (["train", "digts"], "did you mean 'digits'?"),
    (["train", "nowhere.toml"], "nowhere.toml does not exist"),
    (["train", "digits", "--stepz", "3"], "did you mean --steps?"),
    (["train", "digits", "--no-data.use-labels"], "did you mean --data.no-use-labels?"),
    (["train", "digits", "--steps", "many"], "train: --steps: 'many' is not a whole number"),
    (["train", "digits", "--lora.alpha", "much"], "train: --lora.alpha: 'much' is not a number"),
    (["sample", "--seed", "1.5"], "sample: --seed: '1.5' is not a whole number"),
    (["train", "digits", "--steps", "0"], "steps=0 must be at least 1"),
    (["train", "digits", "--optimizer.learning-rate", "0"], "train: optimizer.learning_rate=0.0 must be above 0"),
    (["train", "digits", "--optimizer.betas", "0.9", "1.5"], "train: optimizer.betas[1]=1.5 must be below 1"),
    (["train", "digits", "--optimizer.schedule", "cosine"], "train: optimizer: cooldown_share is for constant"),
    (["train", "digits", "--sampling.num-steps", "0"], "train: sampling.steps=0 must be at least 1"),
    (["train", "digits", "--model.preset", "m", "--dry-run"], "--model.preset"),
    (["train", "digits", "--data.image-size", "12"], "choose a multiple of 8"),
    (["train", "digits", "--model.width", "30", "--dry-run"], "multiple of 4"),
    (["train", "digits", "--device", "cuda:9", "--out", "x"], "device 'cuda:9' cannot be used here"),
    (["train", "folder", "--data.source", "nowhere"], "nowhere is not a folder"),
    (["sample", "nowhere"], "nowhere does not exist"),
    (["info", "xxl"], "did you mean 'xl'?"),
    (["info", "xl", "--image-size", "100"], "the nearest is 96"),
    (["convert", "nowhere.pt", "model"], "nowhere.pt does not exist"),
    (["convert", "shipped", "model.pt"], "this model has objective='flow'"),
    (["convert", "shipped", "model.pt", "--weights", "ema"], "a folder has one set: leave it out"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_are_answered_in_one_line(lamamba, tmp_path, arguments, said):
    status, _, err = lamamba(*arguments)
    assert status == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "said"), [
    (["--classes", "10"], "label 10 is out of range; this model knows 0 .. 9"),
    (["--classes", "seven"], "label 'seven' is unknown"),
    (["--sampler", "ddpm"], "use flow-euler or flow-heun"),
    (["--num", "0"], "num=0 must be at least 1"),
    (["--steps", "0"], "steps=0 must be at least 1"),
    (["--autoencoder", "x"], "leave autoencoder out"),
])
def test_sampling_mistakes_leave_the_old_picture(trained, lamamba, tmp_path, arguments, said):
    (tmp_path / "samples.png").write_text("precious")
    status, _, err = lamamba("sample", trained, *arguments)
    assert (status, said in err, len(err.strip().splitlines())) == (2, True, 1), err
    assert (tmp_path / "samples.png").read_text() == "precious"


def test_a_run_of_another_configuration_is_not_overwritten(trained, lamamba):
    before = (trained / "config.json").read_bytes()
    status, _, err = lamamba("train", "digits", *TINY, "--out", trained, "--seed", 5)
    assert (status, "train.seed: 0 there, 5 here" in err) == (2, True)
    assert (trained / "config.json").read_bytes() == before


def test_an_existing_target_is_not_overwritten(lamamba, tmp_path):
    (tmp_path / "model").mkdir()
    status, _, err = lamamba("convert", PARITY / "official_checkpoint.pt", "model")
    assert (status, "exists already" in err) == (2, True)
