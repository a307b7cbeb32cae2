"""Calls of the library beside others in one process: global state, paths, bad values, and targets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lamamba
from lamamba.data.digits import Digits
from lamamba.metrics.digits import DigitClassifier
from lamamba.metrics.digits_network import DigitFeatures
from lamamba.models.official import load_official
from tests.networks import TINY

OFFICIAL = Path(__file__).parent.parent / "parity" / "official_checkpoint.pt"


def tiny(out, **changes):
    fields = {"steps": 1, "batch_size": 4, "model": TINY, "sampling": {"every": 0}}
    return lamamba.TrainOptions.from_recipe("digits", out=out, **{**fields, **changes})


def random_states():
    return torch.get_rng_state().tolist(), [np.asarray(part).tolist() for part in np.random.get_state()[1:3]]  # noqa: NPY002


@pytest.mark.parametrize("call", [
    lambda folder: lamamba.train(tiny(folder / "run"), progress=None),
    lambda folder: load_official(OFFICIAL),
    lambda folder: DigitFeatures(),
    lambda folder: DigitClassifier(Digits().images, Digits().labels),
], ids=["train", "load_official", "DigitFeatures", "DigitClassifier"])
def test_a_call_leaves_the_random_state_of_its_caller(call, tmp_path):
    before = random_states()
    call(tmp_path)
    assert random_states() == before


def test_training_does_not_depend_on_the_random_state_of_its_caller(tmp_path):
    torch.manual_seed(1)
    first = lamamba.train(tiny(tmp_path / "a"), progress=None)
    torch.manual_seed(2)
    second = lamamba.train(tiny(tmp_path / "b"), progress=None)
    assert first.metrics["loss"] == second.metrics["loss"]


@pytest.mark.parametrize("make", [
    lambda path: lamamba.CheckDataOptions(source=path).source,
    lambda path: lamamba.EncodeOptions(source=path, autoencoder=path).autoencoder,
    lambda path: lamamba.InfoOptions(model=path).model,
    lambda path: lamamba.ExportOptions(source="run", target="folder", labels=path, autoencoder=path).labels,
    lambda path: lamamba.AppOptions(autoencoder=path).autoencoder,
    lambda path: lamamba.SampleFolderOptions(num=1, autoencoder=path).autoencoder,
    lambda path: lamamba.EvaluateOptions(samples=path, reference=path, weights=path).weights,
    lambda path: tiny("run", data={"source": path}).data.source,
])
def test_a_path_serves_where_a_name_does(make):
    assert make(Path("some/folder")) == str(Path("some/folder"))


def test_recipes_by_path_and_numbers_of_numpy():
    options = lamamba.TrainOptions.from_recipe(Path("digits"), steps=np.int64(3), optimizer={
        "learning_rate": np.float32(0.5)})
    assert (options.steps, options.optimizer.learning_rate) == (3, 0.5)


@pytest.mark.parametrize("given", ["s", None, 3, {"model": "s"}])
@pytest.mark.parametrize("name", [
    "benchmark", "check_data", "compare", "compute_statistics", "convert", "demo", "doctor", "encode", "evaluate",
    "export", "info", "open_app", "plan", "plot", "sample", "sample_folder", "train",
])
def test_a_verb_says_which_options_it_takes(name, given):
    if given is None and name in ("demo", "doctor", "open_app"):
        pytest.skip("None means the defaults")
    with pytest.raises(TypeError, match=rf"lamamba.{name} takes (\w+Options), not .*: lamamba.{name}\(lamamba.\1\("):
        getattr(lamamba, name)(given)
    with pytest.raises(TypeError, match=r"\(lamamba\.\w+Options\(\.\.\.\)\)"):
        getattr(lamamba, name)(options=["wrong"])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("make", [
    lambda value: lamamba.BenchmarkOptions(seconds=value),
    lambda value: lamamba.SampleFolderOptions(num=1, guidance=value),
    lambda value: lamamba.EvaluateOptions(samples="digits", reference="digits", guidance=(value,)),
    lambda value: tiny("run", loss={"logit_mean": value}),
    lambda value: tiny("run", optimizer={"learning_rate": value}),
])
def test_numbers_that_are_not_finite_are_refused(make, value):
    with pytest.raises(ValueError, match="must be finite"):
        make(value)


def test_no_bound_of_the_gradient_is_infinity():
    assert tiny("run", optimizer={"max_grad_norm": math.inf}).optimizer.max_grad_norm == math.inf
    with pytest.raises(ValueError, match="max_grad_norm"):
        tiny("run", optimizer={"max_grad_norm": math.nan})


def test_targets_are_tried_before_the_work(tmp_path):
    calls = []
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    (tmp_path / "m.json").mkdir()
    with pytest.raises(ValueError, match="is a folder; name a file in it; name a path .* manifest"):
        lamamba.check_data(
            lamamba.CheckDataOptions(source=tmp_path / "images", manifest=tmp_path / "m.json"), progress=calls.append)
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        lamamba.benchmark(lamamba.BenchmarkOptions(json=tmp_path), progress=calls.append)
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        (tmp_path / "folder.png").mkdir()
        lamamba.plot(lamamba.PlotOptions(runs=("run",), out=tmp_path / "folder.png"))
    assert not calls


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "3"])
def test_a_plot_of_lines_that_are_no_runs(text, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match="is not of a training run: line 1 has step="):
        lamamba.plot(lamamba.PlotOptions(runs=(path,), out=tmp_path / "plot.png"))


def test_convert_makes_the_folder_of_its_target_both_ways(tmp_path):
    folder, file = tmp_path / "a" / "model", tmp_path / "b" / "c" / "model.pt"
    lamamba.convert(lamamba.ConvertOptions(source=OFFICIAL, target=folder))
    assert lamamba.convert(lamamba.ConvertOptions(source=folder, target=file)).path.is_file()


def test_info_of_a_run_a_checkpoint_and_a_pipeline(tmp_path):
    run = lamamba.train(tiny(tmp_path / "run"), progress=None)
    lamamba.export(lamamba.ExportOptions(source=run.folder, target=tmp_path / "pipeline", images=0))
    folders = run.folder, run.checkpoint, tmp_path / "pipeline"
    costs = [lamamba.info(lamamba.InfoOptions(model=folder)).cost for folder in folders]
    assert costs[0] == costs[1] == costs[2]
    with pytest.raises(FileNotFoundError, match="holds no model"):
        lamamba.info(lamamba.InfoOptions(model=tmp_path))


def test_the_repr_of_a_model_is_short():
    assert len(repr(lamamba.open_model())) < 1000
