"""Image k depends on seed k alone, and bad requests are refused before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamamba.generation import generate
from tests.networks import random_network, small_config


@pytest.mark.parametrize(("objective", "sampler"), [
    ("flow", "flow-euler"), ("flow", "flow-heun"), ("noise", "ddpm"), ("noise", "ddim"), ("noise", "dpm++"),
])
def test_an_image_depends_on_its_seed_and_label_alone(objective, sampler):
    model = random_network(small_config(in_channels=1, objective=objective, width=8))
    labels, seeds = [0, 1, 2, 0, 1], [5, 6, 7, 8, 9]
    settings = dict(sampler=sampler, num_steps=4, guidance=2.0)
    together = generate(model, labels, seeds, **settings)
    assert together.shape == (5, 8, 8, 1)
    assert together.dtype == np.uint8
    assert np.ptp(together) > 10
    for batch_size in (1, 2):
        apart = generate(model, labels, seeds, batch_size=batch_size, **settings)
        assert np.abs(apart.astype(int) - together.astype(int)).max() <= 1
    shuffled = generate(model, labels[::-1], seeds[::-1], **settings)
    assert np.abs(shuffled[::-1].astype(int) - together.astype(int)).max() <= 1
    assert not np.array_equal(generate(model, labels, [s + 100 for s in seeds], **settings), together)


def test_progress_covers_all_batches():
    model = random_network(small_config(in_channels=1, objective="flow", width=8))
    seen = []
    generate(model, [0] * 3, range(3), num_steps=2, batch_size=2, on_step=lambda *numbers: seen.append(numbers))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_unconditional_models_take_no_labels():
    model = random_network(small_config(in_channels=1, objective="flow", width=8, num_classes=0))
    assert generate(model, None, [0, 1], num_steps=2).shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="unconditional"):
        generate(model, [0], [0], num_steps=2)
    with pytest.raises(ValueError, match="needs a class-conditional model"):
        generate(model, None, [0], num_steps=2, guidance=2.0)


@pytest.mark.parametrize(("changes", "said"), [
    (dict(labels=[0, 3]), "label 3 is out of range; this model knows 0 .. 2"),
    (dict(labels=[0]), "1 labels came with 2 seeds"),
    (dict(labels=None), "class-conditional: give labels"),
    (dict(seeds=[]), "no seeds were given"),
    (dict(batch_size=0), "batch_size=0"),
    (dict(sampler="ddpm"), "use flow-euler or flow-heun"),
])
def test_bad_requests(changes, said):
    model = random_network(small_config(in_channels=1, objective="flow", width=8))
    with pytest.raises(ValueError, match=said):
        generate(model, **{"labels": [0, 1], "seeds": [0, 1], "num_steps": 2, **changes})


def test_sampling_leaves_the_global_random_state_alone():
    model = random_network(small_config(in_channels=1, objective="noise", width=8))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(model, [0], [0], sampler="ddpm", num_steps=3)
    assert torch.equal(before, torch.get_rng_state())
