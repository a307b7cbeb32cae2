"""The models that come with the package are small, complete, and sample the digits of their labels."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lamamba
from lamamba.data.digits import Digits
from lamamba.metrics.digits import DigitClassifier, nearest_distances
from lamamba.options.training import load_recipe
from lamamba.pretrained import shipped_model
from lamamba.runs.model import open_network
from lamamba.sampling import generate

WEIGHTS = "diffusion_pytorch_model.safetensors"
RECIPES = {"shipped": "digits_small", "shipped-few-steps": "digits_few_steps"}
of_each = pytest.mark.parametrize("name", RECIPES)


@of_each
def test_it_is_small_and_in_bfloat16(name):
    folder = shipped_model(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.bfloat16}
    model, facts = open_network(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert facts.label_names == tuple("0123456789")


@of_each
def test_it_is_the_recipe(name):
    """Whoever trains the recipe gets a network of the same shape."""
    model, facts = open_network(name)
    recipe = load_recipe(RECIPES[name])
    plan = lamamba.plan(lamamba.TrainOptions.from_recipe(RECIPES[name], device="cpu"))
    assert model.architecture == plan.architecture
    assert facts.guidance == recipe.sampling.guidance
    assert "_name_or_path" not in json.loads((shipped_model(name) / "config.json").read_text())


@pytest.mark.parametrize(("name", "steps"), [("shipped", 10), ("shipped-few-steps", 1), ("shipped-few-steps", 2)])
def test_its_samples_are_classified_as_their_labels(name, steps):
    digits, (model, _) = Digits(), open_network(name)
    labels = np.arange(20) % 10
    samples = generate(model, labels.tolist(), range(500, 520), num_steps=steps, guidance=1.75)
    classifier = DigitClassifier(digits.images, digits.labels)
    assert (classifier.classify(samples) == labels).sum() >= 18
    assert nearest_distances(samples, digits.images).min() > 0.2                # none is a copy


def test_damage_is_named(tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(shipped_model(), folder)
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        open_network(folder)
