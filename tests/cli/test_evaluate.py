"""lamamba evaluate: the same figures at any number of processes, results that compare or not, errors in one line."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamamba.cli.main import main
from lamamba.data.digits import Digits
from lamamba.evaluation import figures as evaluation_figures
from lamamba.metrics import Statistics, frechet_distance, inception_score, precision_recall
from lamamba.metrics.digits_network import DigitFeatures
from lamamba.metrics.inception import Inception, InceptionFeatures
from lamamba.metrics.scores import softmax
from lamamba.options.evaluation import EvaluateOptions
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import load_network
from lamamba.sampling import generate
from lamamba.utils.files import write_json
from lamamba.viz.curves import evaluation_curves
from tests.files import write_manifest
from tests.networks import grey_network
from tests.training.together import command, command_on, needs_fork_server

SAMPLE = ["--reference", "digits", "--features", "digits", "--num-images", 40, "--steps", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with two checkpoints, each with two averages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for step in (10, 20):
        place = folder / "checkpoints" / f"step_{step:08d}"
        for seed, name in enumerate(("model", "ema", "ema_0.9")):
            grey_network(seed + step, num_classes=10, width=16).save_pretrained(place / name)
        ModelMetadata(objective="flow", image_size=8, label_names=Digits.label_names).save(place / "sampling.json")
        write_json(place / "state.json", {"version": 1, "step": step, "ema_decays": [0.99, 0.9]})
        write_manifest(place)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Saved statistics of the digits."""
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    assert main(["evaluate", "stats", "digits", "--features", "digits", "--out", str(path)]) == 0
    return path


def figures(path, entry=0):
    return json.loads(Path(path).read_text())["entries"][entry]["figures"]


def test_figures_of_a_run_are_those_of_its_samples(lamamba, run):
    status, printed, error = lamamba("evaluate", run, *SAMPLE, "--shard-size", 16, "--batch-size", 7)
    assert status == 0, error
    model = load_network(run / "checkpoints" / "step_00000020" / "ema")
    labels = [int.from_bytes(hashlib.sha256(f"label {k}".encode()).digest()[:8], "big") % 10 for k in range(40)]
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
    assert "sampled at guidance 1, the protocol of published figures" in printed
    assert sorted(p.name for p in Path().iterdir()) == ["evaluation.json"]       # features are gone
    protocol = json.loads(Path("evaluation.json").read_text())["entries"][0]["protocol"]
    assert protocol["seeds"] == [[0, 39]]
    assert protocol["images"] == 40
    assert protocol["samples"]["step"] == 20
    assert protocol["samples"]["ema"] == 0.99
    assert protocol["samples"]["sampler"] == "flow-euler"
    assert protocol["samples"]["evaluations"] == 2
    assert protocol["samples"]["guidance"] == 1
    assert protocol["samples"]["labels"] == "random"
    assert len(protocol["network"]["sha256"]) == len(protocol["samples"]["weights_sha256"]) == 64


@needs_fork_server
def test_figures_are_the_same_at_any_number_of_processes(lamamba, run):
    assert lamamba("evaluate", run, *SAMPLE, "--shard-size", 25)[0] == 0
    printed = command_on(2, Path.cwd(), "evaluate", run, *SAMPLE, "--shard-size", 25, "--out", "two.json")
    assert "".join(printed).count("FD-digits") == printed[0].count("FD-digits") == 1        # rank 0 prints
    one, two = figures("evaluation.json"), figures("two.json")
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@needs_fork_server
def test_a_kill_loses_at_most_one_shard(lamamba, run, reference):
    evaluate = ["evaluate", run, *SAMPLE, "--shard-size", 4, "--reference", reference, "--num-images", 120,
                "--steps", 8, "--keep-features"]
    process = command(Path.cwd(), *evaluate)
    deadline = time.monotonic() + 120
    while len(shards := sorted(Path().glob("evaluation.work/*/shard_*.safetensors"))) < 3:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert lamamba(*evaluate)[0] == 0
    again = [shard for shard, before in times.items() if shard.stat().st_mtime_ns != before]
    assert len(again) <= 1                                                      # renamed, but without its hash yet
    assert len(list(Path().glob("evaluation.work/*/shard_*.safetensors"))) == 30
    undisturbed = figures("evaluation.json")
    assert lamamba(*evaluate[:-1], "--out", "again.json", "--shard-size", 50)[0] == 0
    assert figures("again.json") == pytest.approx(undisturbed, rel=1e-4, abs=1e-5)


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
    assert {"lamamba", "torch", "numpy", "diffusers", "pillow", "python"} == first["protocol"]["versions"].keys()

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


@pytest.mark.parametrize("sweep", [True, False])
def test_curves_ring_the_best_and_no_texts_overlap(tmp_path, monkeypatch, sweep):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    courses = [(1, 9.6, 0.68), (1.125, 6.5, 0.66), (1.25, 4.1, 0.63), (1.375, 2.9, 0.6), (1.5, 2.3, 0.57),
               (1.75, 2.9, 0.52), (2, 4.4, 0.47), (4, 14, 0.2)]
    entries = [
        {"step": None if sweep else int(place * 400_000), "ema": ema, "guidance": place if sweep else 1.0,
         "figures": {"frechet": value + extra, "recall": recall, "precision": 0.8}, "spread": {"frechet": 0.2}}
        for place, value, recall in courses for ema, extra in (((None, 0),) if sweep else ((0.999, 0.5), (0.9, 0)))
    ]
    evaluation_curves(entries, "FID", tmp_path / "curve.png")
    (figure,) = drawn
    left, right = figure.axes
    assert left.get_title() == ("ringed: 2.3 at guidance 1.5" if sweep else "ringed: 2.3 at step 600,000, EMA 0.9")
    rings = [line for axes in figure.axes for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [tuple(ring.get_xydata()[0]) for ring in rings] == ([(1.5, 2.3), (0.57, 2.3)] if sweep else [(6e5, 2.3)])
    if sweep:
        assert sorted(text.get_text() for text in right.texts) == sorted(f"{place:g}" for place, *_ in courses)
    else:
        assert [text.get_text() for text in left.get_legend().get_texts()] == ["EMA 0.999", "EMA 0.9"]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        below = [word for word in axes.get_xticklabels() if low <= word.get_position()[0] <= high]
        words = [word for word in (*axes.texts, *below, *axes.get_yticklabels()) if word.get_text()]
        boxes = [word.get_window_extent() for word in words]
        for k, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:k]), words[k].get_text()


def test_one_checkpoint_gives_no_curve_and_a_note(lamamba, run):
    for name in ("model", "ema"):
        shutil.copytree(run / "checkpoints" / "step_00000010" / name, f"one/checkpoints/step_00000010/{name}")
    place = Path("one/checkpoints/step_00000010")
    shutil.copy(run / "checkpoints" / "step_00000010" / "sampling.json", place)
    write_json(place / "state.json", {"version": 1, "step": 10, "ema_decays": [0.99]})
    write_manifest(place)
    status, printed, error = lamamba("evaluate", "one", *SAMPLE, "--every-checkpoint")
    assert status == 0, error
    assert "training keeps more with keep_checkpoints or keep_every" in printed
    assert not Path("evaluation.png").exists()
    (place.parent / "step_00000020").mkdir()
    status, _, error = lamamba("evaluate", "one", *SAMPLE, "--every-checkpoint", "--out", "two.json")
    assert (status, "step_00000020 is no whole checkpoint" in error) == (2, True), error


def test_changed_files_are_evaluated_again(lamamba, colour):
    """Cached features are of files as they were: other pixels under the same names and sizes have none."""
    names = sorted(Path("folder").glob("*.png"))
    for path in names:
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    command = ["evaluate", "folder", "--reference", "packed.npz", *MEANS, "--keep-features"]
    assert lamamba(*command)[0] == 0
    assert figures("evaluation.json")["frechet"] == pytest.approx(0, abs=1e-6)
    as_reference = ["evaluate", "packed.npz", "--reference", "folder", *MEANS, "--keep-features", "--out", "other.json"]
    assert lamamba(*as_reference)[0] == 0
    for path, image in zip(names, 255 - colour // 2, strict=True):
        Image.fromarray(image).save(path.with_suffix(".bmp"))
    for arguments, result in ((command, "evaluation.json"), (as_reference, "other.json")):
        assert lamamba(*arguments)[0] == 0
        assert figures(result)["frechet"] > 0.1


def test_a_function_that_has_changed_is_another_feature_network(lamamba, colour):
    command = ["evaluate", "folder", "--device", "cpu", "--features", "changing:mean"]
    Path("changing.py").write_text("def mean(images):\n    return images.mean(axis=(1, 2))\n")
    assert lamamba("evaluate", "stats", *command[1:], "--out", "reference.npz")[0] == 0
    assert lamamba(*command, "--reference", "reference.npz", "--keep-features")[0] == 0
    assert figures("evaluation.json")["frechet"] == pytest.approx(0, abs=1e-6)
    Path("changing.py").write_text("def mean(images):\n    return 2.0 + images.mean(axis=(1, 2))\n")
    del sys.modules["changing"]
    importlib.invalidate_caches()
    status, _, error = lamamba(*command, "--reference", "reference.npz", "--keep-features")
    assert (status, "was made by another feature network (sha256" in error) == (2, True), error


def test_features_of_a_tar_that_has_changed_are_computed_again(lamamba, colour):
    pytest.importorskip("webdataset", reason="needs webdataset")
    command = ["evaluate", "set.tar", "--reference", "packed.npz", *MEANS, "--keep-features"]
    for number, images in enumerate((colour, 255 - colour // 2)):
        with tarfile.open("set.tar", "w") as archive:
            for k, image in enumerate(images):
                Image.fromarray(image).save("one.bmp")
                archive.add("one.bmp", f"{k:02d}.bmp")
        assert lamamba(*command)[0] == 0
        assert (figures("evaluation.json")["frechet"] > 0.1) == bool(number)


def save_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def colour(lamamba):
    """A folder and an npz of the same 12 colour images, and a function of them that can be imported."""
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    for k, image in enumerate(images):
        save_png(Path(f"folder/{k:02d}.png"), image)
    np.savez_compressed("packed.npz", arr_0=images)
    np.savez("loose.npz", arr_0=images)
    return images


def means(images):
    """A feature network with five features, which the command line imports."""
    x = images.astype(np.float64) / 255
    return np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2, 3))[:, None], x[:, 0, 0, :1]], axis=1)


def holes(images):
    return means(images) * np.where(np.arange(len(images)) == 3, np.nan, 1)[:, None]


MEANS = ["--features", "tests.cli.test_evaluate:means", "--device", "cpu"]


def test_folders_and_npz_files_and_saved_statistics(lamamba, colour):
    assert lamamba("evaluate", "stats", "folder", *MEANS, "--out", "reference.npz")[0] == 0
    with np.load("reference.npz", allow_pickle=False) as saved:
        np.testing.assert_allclose(saved["mu"], means(colour).mean(0), rtol=1e-6)
        np.testing.assert_allclose(saved["sigma"], np.cov(means(colour).T), rtol=1e-5)
    results = []
    for number, (samples, reference) in enumerate([
        ("folder", "folder"), ("packed.npz", "folder"), ("loose.npz", "reference.npz"), ("folder", "packed.npz")
    ]):
        status, _, error = lamamba("evaluate", samples, "--reference", reference, *MEANS, "--out", f"{number}.json",
                                   "--shard-size", 5, "--batch-size", 2)
        assert status == 0, error
        results.append(figures(f"{number}.json"))
    for result in results:
        assert result["frechet"] == pytest.approx(0, abs=1e-6)
        assert result["precision"] == result["recall"] == 1
        assert result == pytest.approx(results[0], abs=1e-6)
    half = lamamba("evaluate", "folder", "--reference", "reference.npz", *MEANS, "--num-images", 6, "--out", "6.json")
    assert half[0] == 0
    assert lamamba("evaluate", "stats", "folder", *MEANS, "--out", "fewer.npz", "--rows", 8)[0] == 0
    assert lamamba("evaluate", "folder", "--reference", "fewer.npz", *MEANS, "--out", "fewer.json")[0] == 0
    protocol = json.loads(Path("fewer.json").read_text())["entries"][0]["protocol"]
    assert (protocol["reference"]["rows"], protocol["settings"]["kernel_subset"]) == (8, 8)
    status, _, error = lamamba("evaluate", "compare", "2.json", "fewer.json")
    assert (status, "differ in the reference images (rows 12 against 8)" in error) == (2, True), error
    status, _, error = lamamba("evaluate", "compare", "2.json", "6.json")
    assert status == 2
    assert "2 and 6 cannot be compared: they differ in the number of samples (12 against 6)" in error
    assert lamamba("evaluate", "compare", "0.json", "2.json")[0] == 0           # statistics of the same folder


def test_a_reference_of_adms_kind(lamamba, monkeypatch):
    """mu, sigma, mu_s, sigma_s of all images, and some of the images under arr_0."""
    calls = []
    monkeypatch.setattr(                                                        # takes seconds
        evaluation_figures, "frechet_distance", lambda *given: calls.append(given) or len(given[0])
    )
    torch.manual_seed(0)
    torch.save(Inception().state_dict(), "weights.pth")
    draws = np.random.default_rng(0)
    real, fake = draws.integers(0, 256, (2, 6, 16, 16, 3), dtype=np.uint8)
    network = InceptionFeatures("weights.pth")
    outputs, mine = network(real), network(fake)
    moments = {"mu": outputs["features"].mean(0), "sigma": np.cov(outputs["features"].T),
               "mu_s": outputs["spatial"].mean(0), "sigma_s": np.cov(outputs["spatial"].T)}
    np.savez("reference.npz", arr_0=real[:5], **moments)
    np.savez("samples.npz", arr_0=fake)
    arguments = ["--reference", "reference.npz", "--weights", "weights.pth", "--device", "cpu"]
    status, printed, error = lamamba("evaluate", "samples.npz", *arguments, "--batch-size", 6)
    assert status == 0, error
    found = figures("evaluation.json")
    assert (found["frechet"], found["frechet_spatial"]) == (2048, 2023)
    for given, key, end in zip(calls, ("features", "spatial"), ("", "_s"), strict=True):
        mu, sigma, reference_mu, reference_sigma = given
        np.testing.assert_allclose(mu, mine[key].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sigma, np.cov(mine[key].T), rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(reference_mu, moments[f"mu{end}"])
        np.testing.assert_array_equal(reference_sigma, moments[f"sigma{end}"])
    assert [line.split()[0] for line in printed.splitlines()[1:3]] == ["FID", "sFID"]
    assert (found["precision"], found["recall"]) == precision_recall(outputs["features"][:5], mine["features"], 3)
    assert found["inception_score"] == pytest.approx(inception_score(softmax(mine["logits"]))[0], rel=1e-5)
    np.savez("larger.npz", arr_0=draws.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    status, _, error = lamamba("evaluate", "larger.npz", *arguments)
    assert status == 2
    assert "reference.npz is of 16 x 16 images and the samples are 8 x 8" in error
    np.savez("moments.npz", mu=np.zeros(7), sigma=np.eye(7))
    status, _, error = lamamba("evaluate", "samples.npz", *arguments, "--reference", "moments.npz")
    assert status == 2
    assert "moments.npz has 7 features, Inception's pool3 2048" in error


def test_errors_are_one_line(lamamba, colour, run, reference):
    digits = Digits().images.transpose(0, 2, 3, 1)
    np.savez("one.npz", arr_0=colour[:1])
    np.savez("objects.npz", arr_0=np.array([{}, []], dtype=object))
    np.savez("floats.npz", arr_0=colour / 255)
    np.savez("grey.npz", arr_0=digits[:9])
    np.savez("moments.npz", mu=np.zeros(7), sigma=np.eye(7))
    Path("cut.npz").write_bytes(Path("loose.npz").read_bytes()[:900])
    flipped = bytearray(Path("loose.npz").read_bytes())
    flipped[700] ^= 1
    Path("flipped.npz").write_bytes(bytes(flipped))
    save_png(Path("sizes/a.png"), colour[0])
    save_png(Path("sizes/b.png"), np.tile(colour[1], (2, 1, 1)))
    save_png(Path("mixed/a.png"), colour[0])
    save_png(Path("mixed/b.png"), colour[0, :, :, 0])
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(Path("folder/00.png").read_bytes()[:60])
    folder = ["--reference", "folder", *MEANS]
    for arguments, message in [
        (["one.npz", *folder], "one.npz has 1 image; distances between sets need at least 2"),
        (["sizes", *folder], "b.png is 12 x 5 colour, a.png is 6 x 5 colour; all images of a set have one size"),
        (["mixed", *folder], "b.png is 6 x 5 grey, a.png is 6 x 5 colour"),
        (["grey.npz", "--reference", "grey.npz", *MEANS], "grey images and tests.cli.test_evaluate:means reads colour"),
        (["folder", "--reference", "folder", "--features", "digits"], "colour images and digits reads grey"),
        (["folder", "--reference", reference, *MEANS], "was made by another feature network"),
        (["folder", "--reference", "moments.npz", *MEANS], "does not say which network made it"),
        (["grey.npz", "--reference", "loose.npz", "--features", "digits"], "are 6 x 5 and 8 x 8 pixels"),
        (["folder", "--reference", "folder", "--features", "tests.cli.test_evaluate:holes"],
         "1 of 12 images are NaN or infinite, first of image 3"),
        (["cut.npz", *folder], "cut.npz is damaged or no npz file"),
        (["flipped.npz", *folder], "flipped.npz is damaged"),
        (["objects.npz", *folder], "pickled objects under 'arr_0'"),
        (["folder", "--reference", "objects.npz", *MEANS], "pickled objects under 'arr_0'"),
        (["floats.npz", *folder], "floats.npz has float64 (12, 6, 5, 3) under 'arr_0'; samples are uint8 images"),
        (["broken", *folder], "a.png is no good image (truncated"),
        (["nothing", *folder], "nothing does not exist"),
        (["folder", *folder, "--repeats", 2, "--steps", 3], "holds images, not a model: repeats, steps cannot"),
        (["folder", "--reference", "folder", "--features", "incepton"], "did you mean 'inception'"),
        (["folder", "--reference", "folder", "--features", "json:nothing"], "json has no function nothing"),
        (["folder", *folder, "--shard-size", 0], "shard_size=0 must be at least 1"),
        ([run, *SAMPLE, "--guidance", "1,x"], "'1,x' is not a list of numbers with commas"),
        ([run, *SAMPLE, "--guidance", "1,2", "--every-checkpoint"], "two curves"),
        ([run, *SAMPLE, "--guidance", "1,1"], "each scale once, finite and not negative"),
        ([run, *SAMPLE, "--ema", "0.5"], "has no average 0.5; it has 0.99, 0.9, none"),
        ([run, *SAMPLE, "--sampler", "ddpm"], "sampler 'ddpm' is for"),
        ([run, *SAMPLE, "--num-images", 1], "num_images=1 must be at least 2"),
        (["compare", "nothing.json", "x.json"], "nothing.json is no file"),
        (["compare", "x.json"], "at least two result files"),
        (["compare", "folder/00.png", "folder/01.png"], "is not text in UTF-8"),
        (["stats", "folder", *MEANS, "--out", "x.json"], "must end in .npz"),
        (["stats", "loose.npz", *MEANS, "--out", "loose.npz"], "would take the place of the images"),
        (["stats", "folder", *MEANS, "--rows", 1, "--out", "x.npz"], "rows=1 must be at least 2"),
        (["folder", *folder, "--out", "x.png"], "out=x.png: the result is a .json file"),
        (["folder", *folder, "--metrics.kernel-subset", 1], "metrics.kernel_subset=1 must be at least 2"),
        (["", *folder], "an empty path"),
        (["folder", "--reference", run, *MEANS], "is a run or a model, and these are to be images"),
        (["stats", "shipped", *MEANS, "--out", "x.npz"], "shipped is a run or a model"),
        (["folder", "--reference", "", *MEANS], "an empty path"),
        ([run, *SAMPLE, "--seed", 2**63 - 1], "the last image would have 9223372036854775846"),
    ]:
        status, printed, error = lamamba("evaluate", *arguments)
        assert status == 2, (arguments, printed)
        assert message in error, arguments
        assert error.count("\n") == 1, error


def test_files_of_lamamba_sample_have_the_figures_of_the_model(lamamba, run):
    """A folder of PNG files, and an npz file with three equal channels; the protocol holds their plan."""
    many = ["-n", 40, "--random-labels", "--steps", 2, "--guidance", 1, "--device", "cpu"]
    for kind, name in (("png", "folder"), ("npz", "packed")):
        status, _, error = lamamba("sample", run, *many, "--format", kind, "--out", name)
        assert status == 0, error
    against = SAMPLE[:4]
    assert lamamba("evaluate", run, *SAMPLE)[0] == 0
    wanted = figures("evaluation.json")
    del wanted["accuracy"]                                                      # files do not hold the classes
    for samples in ("folder", "packed/samples.npz"):
        status, _, error = lamamba("evaluate", samples, *against, "--out", "files.json")
        assert status == 0, error
        assert figures("files.json") == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        plan = json.loads(Path("files.json").read_text())["entries"][0]["protocol"]["samples"]["made_by"]
        assert (plan["num"], plan["seed"], plan["rule"], plan["settings"]["steps"]) == (40, 0, "random", 2)
    for count, message in ((41, "has 40 images, and num_images=41 asks for more"), (0, "must be at least 2")):
        status, _, error = lamamba("evaluate", "folder", *against, "--num-images", count)
        assert (status, message in error) == (2, True), error
    Path("folder/.sampling").mkdir()
    status, _, error = lamamba("evaluate", "folder", *against)
    assert (status, "lamamba sample has not filled folder yet" in error) == (2, True), error


def test_the_model_of_the_package_is_evaluated_by_name(lamamba):
    status, _, error = lamamba("evaluate", "shipped", *SAMPLE)
    assert status == 0, error
    entry = json.loads(Path("evaluation.json").read_text())["entries"][0]
    assert entry["name"] == entry["protocol"]["samples"]["name"] == "shipped"
    assert entry["figures"]["accuracy"] > 0.8
    status, _, error = lamamba("evaluate", "shipped", *SAMPLE, "--every-checkpoint")
    assert (status, "shipped is no run" in error) == (2, True)


def test_a_tensor_is_no_set_of_images_and_is_named_in_one_line():
    with pytest.raises(ValueError, match=r"^samples: tensor\(\[\[\[\[0\], \[0\].{,50} must be a name"):
        EvaluateOptions(samples=torch.zeros(9, 8, 8, 1, dtype=torch.uint8), reference="digits")


def test_help_needs_no_torch():
    code = ("import sys\nfrom lamamba.cli.main import main\n"
            "for verb in (['evaluate'], ['evaluate', 'stats'], ['evaluate', 'compare']):\n"
            "    try: main([*verb, '--help'])\n    except SystemExit: pass\n"
            "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
