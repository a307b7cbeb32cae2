"""The model that comes with the package is small, complete, and samples the digits of its labels."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamamba.data.digits import Digits
from lamamba.metrics.digits import DigitClassifier, nearest_distances
from lamamba.options.training import load_recipe
from lamamba.pretrained import shipped_model
from lamamba.runs.model import open_network
from lamamba.sampling import generate

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_it_is_small_and_in_bfloat16():
    folder = shipped_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.bfloat16}
    model, facts = open_network(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert facts.label_names == tuple("0123456789")


def test_it_is_the_recipe():
    """Whoever trains the recipe gets a network of the same shape."""
    model, facts = open_network(shipped_model())
    recipe = load_recipe("digits_small")
    expected = recipe.model.build(channels=1, num_classes=10, input_size=facts.image_size)
    assert model.architecture == expected
    assert facts.guidance == recipe.sampling.guidance
    assert "_name_or_path" not in json.loads((shipped_model() / "config.json").read_text())


def test_its_samples_are_classified_as_their_labels():
    digits, (model, _) = Digits(), open_network(shipped_model())
    labels = np.arange(20) % 10
    samples = generate(model, labels.tolist(), range(500, 520), num_steps=10, guidance=1.75)
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
