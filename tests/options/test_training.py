"""A run's configuration: recipes, overrides, checks, and reading what was written."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lamamba.options.training import (
    DataOptions,
    DistillOptions,
    FlowMapOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    ScoreOptions,
    StartOptions,
    TrainConfig,
    TrainOptions,
    load_recipe,
    recipe_names,
)
from lamamba.training.loop import describe
from lamamba.training.sources import PlannedData
from lamamba.training.start import with_network_of_source


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_survives_json(name):
    recipe = load_recipe(name)
    assert TrainConfig.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.warnings() == []
    architecture, metadata = describe(recipe, PlannedData(dataclasses.replace(recipe.data, expected_images=1)))
    size = recipe.data.image_size
    factor = 8 if metadata.codec == "latents" else 1
    assert (metadata.image_size, architecture.input_size[0]) == (size, size // factor)


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('steps = 7\n[optimizer]\nlearning_rate = 1\nbetas = [0.5, 0.6]\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert (recipe.steps, recipe.optimizer.learning_rate, recipe.optimizer.betas) == (7, 1.0, (0.5, 0.6))
    assert recipe.optimizer.max_grad_norm == math.inf


@pytest.mark.parametrize(("text", "said"), [
    ("step = 7", "did you mean 'steps'"),
    ("[optimizer]\nlearningrate = 1", "did you mean 'optimizer.learning_rate'"),
    ("steps = 'many'", "steps='many' must be a whole number"),
    ("model = 3", "must be a section"),
    ("steps = [3]", r"steps=\[3\] must be a whole number"),
    ("[steps]\nall = 3", "steps={'all': 3} must be a whole number"),
    ("data = [1]", r"data=\[1\] must be a section"),
    ("[optimizer]\nbetas = [0.9, 'b']", r"optimizer.betas\[1\]='b' must be a number"),
    ("[optimizer]\nbetas = [0.9]", r"optimizer.betas\[1\] is missing"),
    ("[model]\ndepths = 2", "model.depths=2 must be a list"),
    ("[data]\nmirror = 1", "data.mirror=1 must be true or false"),
    ("[data]\nsource = ['a']", r"data.source=\['a'\] must be text"),
    ("[data.source]\nname = 'a'", "data.source={'name': 'a'} must be text"),
    ("[data]\nchannels = 2", r"data.channels '2' is unknown.*known: 1, 3"),
    ("[sampling]\nsteps = 0", "sampling.steps=0 must be at least 1"),
    ("[score]\nimages = 1", "score.images=1 must be at least 2"),
    ("[optimizer]\nlearning_rate = 0", "optimizer.learning_rate=0 must be above 0"),
    ("[optimizer]\nschedule = 'cosine'\ncooldown_share = 0.5", "optimizer: cooldown_share is for constant"),
    ("steps = = 3", "is not a TOML file"),
    (f"steps = {'9' * 400}", r"mine.toml: steps=9{20}\.\.\. is too large"),
    (f"[model]\ndepths = [1, 1, 1, {'9' * 400}]", r"model.depths\[3\]=9{20}\.\.\. is too large"),
    (f"[{'.'.join('a' * 3_000)}]", "mine.toml is nested too deeply"),
    ("steps = 0", "steps=0 must be at least 1"),
    ("ema_decay = 1.0", r"ema_decays\[0\]=1.0 must be below 1"),
    ("ema_decays = [0.9, 0.9]", "one number or several different ones"),
    ("ema_decays = [0.9, 0.9999991, 0.9999992]", "in their first six digits"),  # one folder for two averages
    ("ema_decay = 0.9\nema_decays = [0.9]", "option 'ema_decay' is unknown; did you mean 'ema_decays'"),
    ("[sampling]\nnum_steps = 2\nsteps = 3", "option 'sampling.num_steps' is unknown"),
    ("[processes]\nthreads = 100000", "processes.threads=100000 must be at most 1024"),
    ("[processes]\ntimeout_minutes = 1e300", "processes.timeout_minutes=1e\\+300 must be at most 525600"),
    ("[optimizer]\nschedule = 'cosin'", "optimizer.schedule 'cosin' is unknown; did you mean 'cosine'"),
    ("[watch]\ntrackers = ['tensorbord']", "did you mean 'tensorboard'"),
    ("keep_every = 700\ncheckpoint_every = 500", "must be a multiple of checkpoint_every=500"),
    ("[loss]\nweighting = 'min-snr'\n[model]\nobjective = 'flow'", "is for noise and v"),
    ("[distill]\nstages = ['encoder.0', 'encoder.0']", "'encoder.0,encoder.0' has encoder.0 twice"),
    ("[lora]\nlayers = ['']", "lora.layers: '' has an empty name"),
    ("[start]\nmode = 'everything'", "give it as start.source"),
    ("[processes]\ncompile = true\nsharding = 'full'", "leave one of them out"),
])
def test_a_file_that_does_not_fit(tmp_path, text, said):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_recipe(str(tmp_path / "mine.toml"))


def test_unknown_recipes(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_recipe("digts")
    with pytest.raises(FileNotFoundError, match=r"nowhere/x\.toml does not exist"):
        load_recipe("nowhere/x.toml")
    (tmp_path / "x.toml").mkdir()
    with pytest.raises(FileNotFoundError, match=r"x\.toml is a folder; give a .toml file"):
        load_recipe(str(tmp_path / "x.toml"))


def test_a_model_that_does_not_fit_its_images():
    with pytest.raises(ValueError, match=r"30 x 30 \(data.image_size, or.*such as 32"):
        ModelOptions().build(channels=1, num_classes=10, input_size=30)
    with pytest.raises(ValueError, match="did you mean 'xl'"):
        ModelOptions(preset="x").build(channels=1, num_classes=10, input_size=32)


def test_an_ema_that_outlasts_the_run_is_warned_of():
    (warning,) = TrainConfig(steps=1300, ema_decays=(0.9999, 0.99)).warnings()
    assert "88%" in warning
    assert "ema_decays=0.9962" in warning


@pytest.mark.parametrize(("changes", "said"), [
    (dict(distill=DistillOptions(features="none")), "distill has no effect without distill.teacher"),
    (dict(flow_map=FlowMapOptions(noise_share=0.5)), "flow_map has no effect with model.objective='noise'"),
    (dict(loss=LossOptions(logit_mean=0.5)), "loss.logit_mean or loss.logit_deviation has no effect where times are"),
    (dict(loss=LossOptions(min_snr_gamma=3.0)), "loss.min_snr_gamma has no effect without loss.weighting='min-snr'"),
    (dict(score=ScoreOptions(reference="digits")), "score has no effect with score.every=0"),
    (dict(loss=LossOptions(logit_mean=0.5), model=ModelOptions(objective="flow")), None),
])
def test_options_that_nothing_reads_are_warned_of(changes, said):
    found = TrainConfig(steps=100_000, **changes).warnings()
    assert [warning.startswith(said or "") for warning in found] == [True] * bool(said)


def test_the_learning_rate_warms_up_and_cools_down():
    config = TrainConfig(steps=100, optimizer=OptimizerOptions(learning_rate=1.0, warmup_steps=10, cooldown_share=0.2))
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert all(a > b > 0 for a, b in zip(rates[80:], rates[81:], strict=False))
    assert dataclasses.replace(config, optimizer=OptimizerOptions()).learning_rate_at(99) == 1e-4


def test_a_cosine_falls_from_the_warm_up_to_zero():
    options = OptimizerOptions(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    rates = [TrainConfig(steps=110, optimizer=options).learning_rate_at(step) for step in range(111)]
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_first_version_s_single_average_is_still_read():
    old = TrainConfig().to_dict()
    del old["ema_decays"], old["processes"], old["loss"]
    assert TrainConfig.from_dict({**old, "ema_decay": 0.99}) == TrainConfig(ema_decays=(0.99,))


def test_the_second_version_s_sampling_steps_are_still_read():
    old = TrainConfig().to_dict()
    old["sampling"] = {"every": 5, "sampler": None, "num_steps": 25, "guidance": 1.5, "per_class": 4}
    sampling = TrainConfig.from_dict(old).sampling
    assert (sampling.every, sampling.steps, sampling.guidance) == (5, 25, 1.5)


@pytest.mark.parametrize(("make", "expected"), [
    (lambda: TrainConfig(steps=0), "steps=0 must be at least 1"),
    (lambda: TrainConfig(steps=2.5), "steps=2.5 must be a whole number"),
    (lambda: TrainConfig(batch_size=10**400), r"batch_size=10{19}\.\.\. is too large"),
    (lambda: TrainConfig(stepz=2), "did you mean 'steps'"),
    (lambda: TrainConfig(model={"width": 8}), "model={'width': 8} must be a section"),
    (lambda: OptimizerOptions(learning_rate=math.nan), "learning_rate=nan must be finite"),
    (lambda: DataOptions(image_size=3), "image_size=3 must be at least 4"),
    (lambda: ScoreOptions(every=-1), "every=-1 must be at least 0"),
    (lambda: StartOptions(mode="all"), "mode 'all' is unknown"),
])
def test_options_are_checked_when_made_in_python(make, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_options_from_a_recipe_with_changes():
    options = TrainOptions.from_recipe("digits", out="x", steps=7, optimizer={"learning_rate": 0.5}, data=DataOptions())
    recipe = load_recipe("digits")
    assert (options.out.name, options.steps, options.optimizer.learning_rate) == ("x", 7, 0.5)
    assert options.optimizer.warmup_steps == recipe.optimizer.warmup_steps
    assert options.config.to_dict() == {**recipe.to_dict(), "steps": 7, "optimizer": {
        **recipe.to_dict()["optimizer"], "learning_rate": 0.5}}
    assert TrainOptions.from_recipe("digits").out.as_posix() == "runs/digits"
    with pytest.raises(ValueError, match=r"option 'optimizer.lr' is unknown"):
        TrainOptions.from_recipe("digits", optimizer={"lr": 1.0})


def test_changes_may_mend_what_does_not_go_together_in_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("keep_every = 700\n[optimizer]\nschedule = 'cosine'\ncooldown_share = 0.5")
    with pytest.raises(ValueError, match=r"mine.toml: optimizer: cooldown_share is for constant"):
        TrainOptions.from_recipe(path)
    with pytest.raises(ValueError, match="keep_every=700 must be a multiple"):
        TrainOptions.from_recipe(path, optimizer={"cooldown_share": 0.0})
    options = TrainOptions.from_recipe(path, optimizer={"cooldown_share": 0.0}, keep_every=0)
    assert (options.keep_every, options.optimizer.schedule) == (0, "cosine")
    path.write_text("steps = 0")
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        TrainOptions.from_recipe(path, keep_every=0)


@pytest.mark.parametrize(("objective", "expected"), [(None, "flow"), ("flow-map", "flow-map"), ("noise", "noise")])
def test_the_objective_is_the_sources_where_none_is_given(objective, expected, tmp_path):
    options = TrainOptions(
        out=tmp_path / "run", start=StartOptions(source="shipped"), model=ModelOptions(objective=objective),
        ema_decays=(0.9,))
    assert with_network_of_source(options).model.objective == expected


@pytest.mark.parametrize(("options", "expected"), [
    (OptimizerOptions(), "constant 1.0e-04"),
    (OptimizerOptions(warmup_steps=250, schedule="cosine"),
     "0 to 1.0e-04 in 250 steps, then 1.0e-04 to 0 along half a cosine"),
    (OptimizerOptions(cooldown_share=0.3), "constant 1.0e-04, to 0 in the last 300 steps"),
])
def test_the_learning_rate_in_words(options, expected):
    assert TrainConfig(steps=1000, optimizer=options).schedule_in_words() == expected
