"""lamamba evaluate: the same figures whatever the processes, results that compare or refuse, mistakes in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.cli.main import main
from lamamba.data.digits import Digits
from lamamba.evaluation import Statistics, frechet_distance
from lamamba.evaluation.digits_network import DigitFeatures
from lamamba.generation import generate
from lamamba.training.state import MANIFEST, SamplingFacts, _hash, _hash_of_hashes, load_network, write_json
from tests.networks import random_network, small_config

SAMPLE = ["--reference", "digits", "--features", "digits", "--num-images", 40, "--steps", 2, "--device", "cpu"]


@pytest.fixture
def lamamba(capsys, monkeypatch, tmp_path):
    """Run a command in this process, in an empty folder: (exit status, what it printed, what it complained)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAMAMBA_TRACEBACK", raising=False)

    def call(*arguments):
        status = main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with two checkpoints, each with two averages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for step in (10, 20):
        place = folder / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        for seed, name in enumerate(("model", "ema", "ema_0.9")):
            config = small_config(in_channels=1, num_classes=10, objective="flow")
            random_network(config, seed=seed + step).save_pretrained(place / name)
        SamplingFacts(objective="flow", image_size=8, label_names=Digits.label_names).save(place / "sampling.json")
        write_json(place / "state.json", {"version": 1, "step": step, "ema_decays": [0.99, 0.9]})
        files = {p.relative_to(place).as_posix(): _hash(p) for p in sorted(place.rglob("*")) if p.is_file()}
        write_json(place / MANIFEST, {"version": 1, "files": files, "files_sha256": _hash_of_hashes(files)})
    return folder


def figures(path, entry=0):
    return json.loads(Path(path).read_text())["entries"][entry]["figures"]


def test_figures_of_a_run_are_those_of_its_samples(lamamba, run):
    status, printed, error = lamamba("evaluate", run, *SAMPLE, "--shard-size", 16, "--batch-size", 7)
    assert status == 0, error
    model = load_network(run / "checkpoints" / "step_00000020" / "ema")
    labels = [int(np.random.default_rng([seed, 1]).integers(10)) for seed in range(40)]
    images = generate(model, labels, range(40), num_steps=2)
    network = DigitFeatures()
    outputs = network(images)
    mine = Statistics(64).add(outputs["features"])
    real = Statistics(64).add(network(Digits().images.transpose(0, 2, 3, 1))["features"])
    expected = frechet_distance(mine.mean, mine.covariance(), real.mean, real.covariance())
    found = figures("evaluation.json")
    assert found["frechet"] == pytest.approx(expected, rel=1e-4)
    assert found["accuracy"] == pytest.approx(np.mean(outputs["logits"].argmax(1) == labels), abs=1 / 40)
    assert {"precision", "recall", "density", "coverage", "kernel", "inception_score"} <= found.keys()
    assert any(line.split() == ["FD-digits", f"{found['frechet']:.4f}"] for line in printed.splitlines())
    assert sorted(p.name for p in Path().iterdir()) == ["evaluation.json"]       # features are gone
    protocol = json.loads(Path("evaluation.json").read_text())["entries"][0]["protocol"]
    assert protocol["seeds"] == [[0, 39]]
    assert protocol["images"] == 40
    assert protocol["samples"]["step"] == 20
    assert protocol["samples"]["ema"] == 0.99
    assert protocol["samples"]["sampler"] == "flow-euler"
    assert protocol["samples"]["evaluations"] == 2
    assert protocol["samples"]["guidance"] == 1
    assert protocol["samples"]["labels"] == "uniform"
    assert len(protocol["network"]["sha256"]) == len(protocol["samples"]["weights_sha256"]) == 64


def test_any_number_of_processes(lamamba, run):
    assert lamamba("evaluate", run, *SAMPLE, "--shard-size", 9)[0] == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lamamba",
         "evaluate", str(run), *map(str, SAMPLE), "--shard-size", "9", "--out", "two.json"],
        capture_output=True, text=True, env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FD-digits") == 1                                  # one process speaks
    one, two = figures("evaluation.json"), figures("two.json")
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_kill_loses_at_most_one_shard(lamamba, run):
    command = [sys.executable, "-m", "lamamba", "evaluate", str(run), *map(str, SAMPLE), "--shard-size", "4",
               "--num-images", "400", "--steps", "20", "--keep-features"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(shards := sorted(Path().glob("evaluation.work/*/shard_*.safetensors"))) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert lamamba(*command[3:])[0] == 0
    assert all(shard.stat().st_mtime_ns == before for shard, before in times.items())


def test_repeats_checkpoints_and_sweeps(lamamba, run):
    status, printed, error = lamamba("evaluate", run, *SAMPLE, "--repeats", 2, "--every-checkpoint")
    assert status == 0, error
    entries = json.loads(Path("evaluation.json").read_text())["entries"]
    assert [(e["step"], e["ema"]) for e in entries] == [(10, 0.99), (10, 0.9), (20, 0.99), (20, 0.9)]
    assert [e["name"] for e in entries] == ["10 ema 0.99", "10 ema 0.9", "20 ema 0.99", "20 ema 0.9"]
    first = entries[0]
    assert first["protocol"]["seeds"] == [[0, 39], [40, 79]]
    both = [r["frechet"] for r in first["runs"]]
    assert first["figures"]["frechet"] == pytest.approx(np.mean(both))
    assert first["spread"]["frechet"] == pytest.approx(np.std(both, ddof=1))
    assert "±" in printed
    with Image.open("evaluation.png") as picture:
        assert picture.width > 800

    status, printed, error = lamamba("evaluate", run, *SAMPLE, "--guidance", "1,2", "--ema", "none", "--out", "s.json")
    assert status == 0, error
    entries = json.loads(Path("s.json").read_text())["entries"]
    assert [e["guidance"] for e in entries] == [1, 2]
    assert entries[0]["ema"] == "none"
    assert entries[0]["figures"]["frechet"] != entries[1]["figures"]["frechet"]
    assert Path("s.png").is_file()

    status, printed, _ = lamamba("evaluate", "compare", "evaluation.json", "s.json")
    assert status == 0
    assert "samples.guidance: 1.0 | 2.0" in printed
    assert "evaluation 10 ema 0.99" in printed
