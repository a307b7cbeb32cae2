"""lamamba.train and lamamba.plan from Python: results, progress, callbacks, a stop and its continuation."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shutil
import signal
import threading

import pytest
import torch

import lamamba
from lamamba.api.train import _LogLines
from lamamba.data.digits import Digits
from lamamba.evaluation.callbacks import check_sampler
from lamamba.options.training import ModelOptions, recipe_names
from lamamba.runs.folder import RunFolder
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import open_network
from lamamba.training.interrupt import Interrupted
from lamamba.training.loop import StepState, describe
from lamamba.training.sources import PlannedData
from tests import networks
from tests.data.test_images import write_images

TINY = dict(
    model=networks.TINY, batch_size=4, ema_decays=(0.5,), steps=4, log_every=1, checkpoint_every=2, device="cpu",
    sampling=dict(every=4, steps=2, per_class=1),
)


def options(folder, **changes):
    return lamamba.TrainOptions.from_recipe("digits", **{"out": folder, **TINY, **changes})


def test_a_run_as_a_call_with_progress_and_result(tmp_path, capsys):
    seen, steps = [], []
    result = lamamba.train(options(tmp_path / "run"), progress=seen.append, callbacks=[lambda s: steps.append(s.step)])
    assert (result.step, result.bad_images, result.metrics["step"], steps) == (4, 0, 4, [1, 2, 3, 4])
    assert [(p.task, p.done, p.total, p.unit, p.resumed) for p in seen] == [
        ("training", step, 4, "steps", 0) for step in steps]
    assert all(word in seen[-1].note for word in ("loss", "grad", "images/s", "GiB"))
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step_00000004"
    assert len(result.metrics_file.read_text().splitlines()) == 4
    assert result.sample_grid.name == "step_00000004.png"
    assert result._repr_png_() == result.sample_grid.read_bytes()
    assert str(result).startswith(f"done: {tmp_path / 'run'}\nsample it: lamamba sample ")
    network, metadata = open_network(result.folder)
    assert all(map(torch.equal, network.parameters(), result.state.ema.parameters()))
    assert metadata.guidance == 1.75                                            # of the recipe
    assert capsys.readouterr() == ("", "")
    again = lamamba.train(options(tmp_path / "run", steps=5), progress=seen.append)
    assert (again.step, seen[-1].done, seen[-1].resumed) == (5, 5, 4)


def test_a_second_training_in_another_thread_is_refused(tmp_path):
    refused = []

    def also_train(state):
        try:
            lamamba.train(options(tmp_path / "other"), progress=None)
        except BlockingIOError as error:
            refused.append(str(error))

    def start(state):
        thread = threading.Thread(target=also_train, args=(state,))
        thread.start()
        thread.join()

    result = lamamba.train(options(tmp_path / "run", steps=1), progress=None, callbacks=[start])
    assert (result.step, len(refused)) == (1, 1)
    assert refused[0].startswith("another thread of this process trains, ")
    assert not (tmp_path / "other").exists()


def test_another_objective_is_refused_where_a_run_goes_on_from_a_source(tmp_path):
    lamamba.train(options(tmp_path / "base", steps=1), progress=None)
    tuned = dataclasses.replace(
        options(tmp_path / "tuned", steps=1, start={"source": str(tmp_path / "base")}), model=ModelOptions())
    lamamba.train(tuned, progress=None)
    with pytest.raises(ValueError, match="another configuration .*objective"):
        lamamba.train(dataclasses.replace(tuned, steps=2, model=ModelOptions(objective="v")), progress=None)
    assert lamamba.train(dataclasses.replace(tuned, steps=2), progress=None).step == 2


def test_other_classes_of_the_same_number_are_warned_of(tmp_path, caplog):
    for number, names in enumerate((("ant", "bee"), ("bee", "cat"))):
        for name in names:
            write_images(tmp_path / f"set{number}" / name, 2)
    data = [dict(source=str(tmp_path / f"set{number}"), image_size=8, channels=3) for number in range(2)]
    lamamba.train(options(tmp_path / "base", steps=1, data=data[0]), progress=None)
    for replaces in (False, True):
        caplog.clear()
        start = dict(source=str(tmp_path / "base"), replace_labels=replaces)
        lamamba.train(options(tmp_path / f"tuned{replaces}", steps=1, data=data[1], start=start), progress=None)
        assert ("was trained on other classes ('ant' where this data has 'bee')" in caplog.text) != replaces


def test_without_a_model_section_the_network_of_the_source_is_trained(tmp_path, capsys):
    """Also of a run that goes on after its source is gone; a model section must describe the source."""
    lamamba.train(options(tmp_path / "whole", steps=2, model={**TINY["model"], "objective": "v"}), progress=None)
    half = lamamba.compress(lamamba.CompressOptions(model=str(tmp_path / "whole"), data="sampling", samples=2,
                                                    remove=0.2, out=tmp_path / "half"), progress=None).path
    recipe = tmp_path / "heal.toml"
    recipe.write_text(f"""
steps = 4
batch_size = 4
checkpoint_every = 2
[sampling]
every = 0
[start]
source = {str(half)!r}
[distill]
teacher = {str(tmp_path / "whole")!r}
""")
    heal = lamamba.TrainOptions.from_recipe(recipe, out=tmp_path / "healed", ema_decays=(0.5,), steps=2)
    pruned = open_network(half)[0].architecture
    assert lamamba.plan(heal).architecture == pruned
    assert lamamba.train(heal, progress=None).state.model.architecture == pruned
    with pytest.raises(ValueError, match=r"leave out the model's options"):
        whole = lamamba.TrainOptions.from_recipe("digits", model={**TINY["model"], "objective": "v"}).model
        lamamba.train(dataclasses.replace(heal, out=tmp_path / "other", model=whole), progress=None)
    with pytest.raises(ValueError, match="objective"):
        lamamba.train(dataclasses.replace(heal, model=ModelOptions(objective="flow")), progress=None)
    half.rename(tmp_path / "elsewhere")
    assert lamamba.train(dataclasses.replace(heal, steps=4), progress=None).state.model.architecture == pruned


def test_data_of_ones_own(tmp_path):
    digits = Digits()
    digits.images, digits.labels = digits.images[:6], digits.labels[:6]
    result = lamamba.train(options(tmp_path, steps=1, sampling=dict(every=0)), data=digits, progress=None)
    assert (result.step, result.sample_grid, result._repr_png_()) == (1, None, None)


def test_where_nobody_watches_some_lines_are_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lamamba.api.train.is_watched", lambda: False)
    monkeypatch.setattr("lamamba.api.train.LOG_LINES", 2)
    with caplog.at_level(logging.INFO, "lamamba"):
        lamamba.train(options(tmp_path, sampling=dict(every=0)))
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert all(word in lines[0] for word in ("loss", "gradient norm", "images/s", "GiB", "s left"))


def test_slow_steps_are_logged_within_seconds_and_then_every_minute(caplog):
    lines = _LogLines(0)
    with caplog.at_level(logging.INFO, "lamamba"):
        for step in range(1, 61):
            lines(StepState(step, 20_000, 0.5, 1.0, 1e-3, 3.2, 8.0 * step, 2**30, None, None))
    logged = [int(record.message.split()[1].split("/")[0]) * 8 for record in caplog.records]
    assert logged[0] == 16
    assert all(b - a <= 60 for a, b in zip(logged, logged[1:], strict=False))
    assert "44 h left" in caplog.records[0].message


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return lamamba.train(options(tmp_path_factory.mktemp("whole"), steps=5, sampling=dict(every=0)), progress=None)


def test_fewer_steps_than_a_run_has_are_warned_of(whole, tmp_path, caplog):
    shutil.copytree(whole.folder, tmp_path / "run")
    shorter = options(tmp_path / "run", steps=3, sampling=dict(every=0))
    said = "the run is at step 5 already and steps=3 counts from its beginning: nothing is trained"
    assert any(said in warning for warning in lamamba.plan(shorter).warnings)
    assert lamamba.train(shorter, progress=None).step == 5
    assert said in caplog.text


@pytest.mark.parametrize(("stop", "checkpoint"), [("signal", "step_00000004"), ("error", "step_00000002")])
def test_a_stopped_call_goes_on_when_made_again(whole, tmp_path, stop, checkpoint):
    """As after an interrupted cell: a signal leaves a checkpoint of its own, an exception the last one."""
    def interrupt(step_state):
        if step_state.step == 3:
            if stop == "error":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)

    same = options(tmp_path, steps=5, sampling=dict(every=0))
    with pytest.raises(KeyboardInterrupt if stop == "error" else Interrupted):
        lamamba.train(same, progress=None, callbacks=[interrupt])
    assert RunFolder(tmp_path).names()[-1] == checkpoint
    result = lamamba.train(same, progress=None)
    assert all(map(torch.equal, whole.state.ema.parameters(), result.state.ema.parameters()))


def test_a_plan_writes_nothing(tmp_path):
    plan = lamamba.plan(options(tmp_path / "run", optimizer=dict(warmup_steps=2, cooldown_share=0.0)))
    assert (plan.images, plan.processes, plan.micro_batch) == (1797, 1, 4)
    assert plan.cost.parameters > 0
    assert "learning rate     0 to 1.0e-03 in 2 steps, then constant 1.0e-03" in str(plan)
    assert not list(tmp_path.iterdir())


def no_features(images):
    return images


REFUSED = {
    "a grid that nothing opens": (dict(sampling=dict(per_class=10**9)), "images of 8 x 8 pixels are too many for one"),
    "a sampler of other models": (dict(sampling=dict(sampler="ddim")), "sampling: sampler 'ddim' is for noise and v"),
    "even where no grid is made": (dict(sampling=dict(every=0, sampler="ddim")), "sampler 'ddim' is for noise and v"),
    "an unknown sampler": (dict(sampling=dict(sampler="eulr")), "sampling: sampler 'eulr' is unknown; did you mean"),
    "too few steps": (dict(model={**TINY["model"], "objective": "v"}, sampling=dict(sampler="heun", steps=1)),
                      "'heun' takes 5 to 1000 steps"),
    "no reference": (dict(score=dict(every=2, features="digits")), "score.reference=None must be statistics"),
    "a reference that is missing": (dict(score=dict(every=2, features="digits", reference="gone.npz")),
                                    "gone.npz is no"),
    "unknown features": (dict(score=dict(every=2, features="inceptio", reference="digits")),
                         "did you mean 'inception'"),
    "features that are missing": (dict(score=dict(every=2, features="gone:f", reference="digits")), "gone:f"),
    "features of another shape": (dict(score=dict(every=2, features=f"{__name__}:no_features", reference="digits")),
                                  "no_features made"),
    "too many held out": (dict(watch=dict(held_out=1797)), "watch.held_out=1797 leaves nothing"),
    "a small batch": (dict(batch_size=1, processes=dict(accumulation_steps=2)), "batch_size=1 cannot be cut"),
    "one process to split": (dict(processes=dict(sharding="full")), "this is only one"),
    "a device": (dict(device="warp"), "device 'warp' cannot be used"),
    "a source that is missing": (dict(start=dict(source="gone")), "gone does not exist"),
    "a source of another kind": (dict(start=dict(source="shipped")), "is another network than this run's"),
    "no official checkpoint": (dict(start=dict(source="gone.pt", mode="everything")), "gone.pt is not a file"),
    "a size": (dict(data=dict(image_size=12)), "12"),
    "colour": (dict(data=dict(channels=3)), "data.channels=3 does not fit the digits"),
    "an autoencoder": (dict(data=dict(autoencoder="kl")), "data.autoencoder does not fit the digits"),
    "digits for latents": (dict(data=dict(kind="latents")), "data.kind='latents' does not fit the digits"),
    "a number of classes": (dict(data=dict(expected_classes=3)), "data.expected_classes=3"),
    "a width": (dict(model=dict(width=7)), "width=7 must be a multiple of 4"),
}


@pytest.mark.parametrize("call", [lamamba.plan, lamamba.train])
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_refused_is_refused_before_the_first_step_and_by_the_plan(tmp_path, monkeypatch, call, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lamamba.training.loop._Trainer._update", lambda *values: pytest.fail("a step was made"))
    changes, said = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        call(options(tmp_path / "run", **changes))
    if call is lamamba.plan:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [lamamba.plan, lamamba.train])
def test_a_folder_that_does_not_fit_is_refused_by_the_plan_and_left_as_it_is(whole, tmp_path, call):
    (tmp_path / "notes.txt").write_text("mine")
    for folder, said in ((tmp_path, "holds no run"), (whole.folder, "train.batch_size: 4 there, 5 here")):
        before = sorted(folder.rglob("*"))
        with pytest.raises((ValueError, OSError), match=said):
            call(options(folder, steps=5, batch_size=5, sampling=dict(every=0)))
        assert [path for path in sorted(folder.rglob("*")) if path.name != ".lock"] == [
            path for path in before if path.name != ".lock"]


def test_a_run_does_not_lie_among_its_images(tmp_path):
    """Its sample grids would be images of the data, and it could not go on. A hidden folder has none."""
    write_images(tmp_path / "photos", 4)
    data = dict(source=str(tmp_path / "photos"), image_size=16, channels=3)
    for call in (lamamba.plan, lamamba.train):
        with pytest.raises(ValueError, match="lies in the folder of the images"):
            call(options(tmp_path / "photos" / "run", data=data))
    inside = options(tmp_path / "photos" / ".run", data=data)
    lamamba.train(dataclasses.replace(inside, steps=2), progress=None)
    assert lamamba.train(inside, progress=None).step == 4


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    def block(progress):
        if progress.done == 1:                                                  # files where folders are expected
            shutil.rmtree(tmp_path / "run" / "samples")
            (tmp_path / "run" / "samples").touch()
            (tmp_path / "run" / "scores.jsonl").mkdir()

    score = dict(every=4, features="digits", reference="digits", images=4)
    assert lamamba.train(options(tmp_path / "run", score=score), progress=block).step == 4
    for name in ("step_00000004.png", "scores.jsonl"):
        assert f"{name} cannot be written: " in caplog.text


@pytest.mark.parametrize(("arguments", "said"), [
    (dict(data="digits"), "data of type str has no name"), (dict(callbacks=[3]), r"callbacks=\[3\] must be a list of"),
    (dict(callbacks=print), "callbacks=<built-in function print> must be"),
])
def test_arguments_of_another_kind_are_refused_before_the_first_step(tmp_path, arguments, said):
    with pytest.raises(TypeError, match=said):
        lamamba.train(options(tmp_path / "run"), progress=None, **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_seed_that_does_not_fit(tmp_path, seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be"):
        options(tmp_path, seed=seed)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("objective", ["noise", "v", "flow"])
def test_samplers_follow_the_objective(name, objective):
    """Of every recipe, whichever objective the command line gives it."""
    model = dict(objective=objective, guidance_range=None)
    config = lamamba.TrainOptions.from_recipe(name, model=model).config
    metadata = describe(config, PlannedData(dataclasses.replace(config.data, expected_images=9)))[1]
    check_sampler(config.sampling, metadata)


def test_a_grid_and_a_score_that_are_missing_are_made_when_the_run_goes_on(tmp_path):
    scored = dict(score=dict(every=4, features="digits", reference="digits", images=4))
    first = lamamba.train(options(tmp_path, **scored), progress=None)
    scores, grid = RunFolder(tmp_path).scores, first.sample_grid
    content = grid.read_bytes(), scores.read_text()
    grid.unlink()
    scores.unlink()
    again = lamamba.train(options(tmp_path, **scored), progress=None)
    assert (again.sample_grid.read_bytes(), scores.read_text()) == content
    changed = grid.stat().st_mtime_ns
    lamamba.train(options(tmp_path, **scored), progress=None)
    assert (grid.stat().st_mtime_ns, scores.read_text()) == (changed, content[1])


def test_a_line_of_metrics_that_is_cut_off_does_not_spoil_the_result(tmp_path):
    def cut(step_state):
        with RunFolder(tmp_path).metrics.open("a") as file:
            file.write('{"step": 9, "lo')

    result = lamamba.train(options(tmp_path, steps=1, sampling=dict(every=0)), progress=None, callbacks=[cut])
    assert result.metrics["step"] == 1


@pytest.mark.parametrize("length", [0, 9])
def test_scores_cut_off_by_a_full_disk_or_a_kill_are_made_again(tmp_path, length):
    changes = dict(steps=2, score=dict(every=2, features="digits", reference="digits", images=4),
                   sampling=dict(every=0, steps=1))
    lamamba.train(options(tmp_path, **changes), progress=None)
    path = RunFolder(tmp_path).scores
    line = path.read_text()
    path.write_text(line[:length])
    lamamba.plot(lamamba.PlotOptions(runs=[tmp_path], out=tmp_path / "plot.png"))
    lamamba.train(options(tmp_path, **changes), progress=None)
    assert path.read_text() == line[:length] + "\n" * bool(length) + line


def test_a_network_too_large_for_its_images_is_warned_of_with_a_size_that_fits(monkeypatch, tmp_path):
    monkeypatch.setattr("lamamba.api.train.SMALL_NETWORK", 10_000)
    monkeypatch.setattr("lamamba.api.train.PARAMETERS_PER_IMAGE", 50)
    plan = lamamba.plan(options(tmp_path, model={**TINY["model"], "width": 32}, steps=1_000_000))
    (warning,) = (warning for warning in plan.warnings if "by heart" in warning)
    width = int(re.search(r"model.width=(\d+)", warning)[1])
    assert width % 4 == 0
    assert 0 < width < 32
    assert f"steps={math.ceil(500 * 1797 / 4)} sees each 500 times" in warning
    fitting = lamamba.plan(options(tmp_path, model={**TINY["model"], "width": width}))
    assert fitting.cost.parameters < plan.cost.parameters


def test_the_plan_comes_first_and_every_value_once(tmp_path):
    plan = lamamba.plan(options(tmp_path / "run"))
    text = str(plan)
    assert text.startswith("run folder ")
    assert len(text.splitlines()) < 40
    assert plan.seconds == pytest.approx(4 * 4 / plan.images_per_second)
    assert re.search(r"\ntime +about \d+ s on this machine, [\d.,e+]+ images/s measured now", text)
    assert "optimizer   learning_rate 0.001, warmup_steps 50, " in text


def test_more_threads_than_free_cores_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr("lamamba.utils.cores.usable_cores", lambda: 4)
    monkeypatch.setattr("lamamba.utils.cores.free_cores", lambda: 1.2)
    for threads, is_warned in ((1, False), (3, True)):
        plan = lamamba.plan(options(tmp_path, processes=dict(threads=threads)))
        assert any("they wait for each other. processes.threads=1" in line for line in plan.warnings) == is_warned


def test_a_run_computes_with_the_threads_that_it_is_given(tmp_path):
    before, seen = torch.get_num_threads(), []
    lamamba.train(options(tmp_path, steps=1, sampling=dict(every=0), processes=dict(threads=before + 1)), progress=None,
                  callbacks=[lambda state: seen.append(torch.get_num_threads())])
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_options_of_the_demo_are_checked():
    """The call itself is tested through the command line, which does nothing else."""
    with pytest.raises(ValueError, match="per_digit=9 must be at least 10"):
        lamamba.DemoOptions(per_digit=9)


@pytest.mark.parametrize(("saved", "classes", "expected"), [(1.75, 10, 1.75), (None, 10, 2.0), (None, 0, 1.0)])
def test_the_default_guidance_scale(saved, classes, expected):
    assert default_guidance(saved, classes) == expected
