"""A run's configuration: recipes, overrides, checks, and reading what was written."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lamamba.training.config import ModelOptions, OptimizerOptions, TrainConfig, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_survives_json(name):
    recipe = load_recipe(name)
    assert TrainConfig.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.warnings() == []
    size = recipe.data.image_size
    recipe.model.build(channels=recipe.data.channels, num_classes=10, input_size=size)


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('steps = 7\n[optimizer]\nlearning_rate = 1\nbetas = [0.5, 0.6]\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert (recipe.steps, recipe.optimizer.learning_rate, recipe.optimizer.betas) == (7, 1.0, (0.5, 0.6))
    assert recipe.optimizer.max_grad_norm == math.inf


@pytest.mark.parametrize(("text", "said"), [
    ("step = 7", "did you mean 'steps'"),
    ("[optimizer]\nlearningrate = 1", "did you mean 'optimizer.learning_rate'"),
    ("steps = 'many'", "steps='many' must be a int"),
    ("model = 3", "must be a section"),
    ("steps = = 3", "is not a TOML file"),
    ("steps = 0", "steps=0 must be at least 1"),
    ("ema_decay = 1.0", r"ema_decay=1.0 must lie in \[0, 1\)"),
])
def test_a_file_that_does_not_fit(tmp_path, text, said):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_recipe(str(tmp_path / "mine.toml"))


def test_unknown_recipes():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_recipe("digts")
    with pytest.raises(FileNotFoundError, match=r"nowhere/x\.toml does not exist"):
        load_recipe("nowhere/x.toml")


def test_a_model_that_does_not_fit_its_images():
    with pytest.raises(ValueError, match=r"data.image_size=30 does not fit.*such as 32"):
        ModelOptions().build(channels=1, num_classes=10, input_size=30)
    with pytest.raises(ValueError, match="did you mean 'xl'"):
        ModelOptions(preset="x").build(channels=1, num_classes=10, input_size=32)


def test_an_ema_that_outlasts_the_run_is_warned_of():
    (warning,) = TrainConfig(steps=1300, ema_decay=0.9999).warnings()
    assert "88%" in warning
    assert "--ema-decay 0.9962" in warning


def test_the_learning_rate_warms_up_and_cools_down():
    config = TrainConfig(steps=100, optimizer=OptimizerOptions(learning_rate=1.0, warmup_steps=10, cooldown_share=0.2))
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert all(a > b > 0 for a, b in zip(rates[80:], rates[81:], strict=False))
    assert dataclasses.replace(config, optimizer=OptimizerOptions()).learning_rate_at(99) == 1e-4
