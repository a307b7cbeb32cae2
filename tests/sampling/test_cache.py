"""Sampling with deep features kept between steps: interval 1 is no cache, and image k depends on seed k alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamamba import LaMambaCacheConfig
from lamamba.diffusion.denoise import SAMPLERS, make_scheduler
from lamamba.diffusion.guidance import Guidance
from lamamba.inference import conditioning
from lamamba.sampling import generate
from lamamba.sampling.generate import ImageGenerator
from tests.networks import grey_network, largest_difference

EVERY_THIRD = LaMambaCacheConfig(interval=3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interval_one_is_no_cache_and_longer_ones_save_passes_with_every_sampler(sampler):
    objective = SAMPLERS[sampler].objectives[0]
    model = grey_network(objective=objective)
    calls = []
    model.merges[0].register_forward_hook(lambda *_: calls.append(1))
    settings = dict(sampler=sampler, num_steps=8, guidance=1.0 if objective == "flow-map" else 2.0)
    plain = generate(model, [0, 1, 2], [5, 6, 7], **settings)
    evaluations = len(calls)
    assert evaluations == len(make_scheduler(sampler, objective, 8).timesteps)
    one = generate(model, [0, 1, 2], [5, 6, 7], cache=LaMambaCacheConfig(interval=1), **settings)
    np.testing.assert_array_equal(one, plain)
    calls.clear()
    cached = generate(model, [0, 1, 2], [5, 6, 7], cache=EVERY_THIRD, **settings)
    assert EVERY_THIRD.full_passes(evaluations) <= len(calls) < evaluations * 0.7
    for batch_size in (1, 2):
        apart = generate(model, [0, 1, 2], [5, 6, 7], cache=EVERY_THIRD, batch_size=batch_size, **settings)
        assert largest_difference(apart, cached) <= 1


@pytest.mark.parametrize("guidance", [
    Guidance(1.0), Guidance(2.0, interval=(0.2, 0.7)), Guidance(2.0, interval=(0.5, 1.0))])
def test_an_image_depends_on_its_seed_alone_where_guidance_comes_and_goes(guidance):
    model = grey_network()
    settings = dict(num_steps=12, guidance=guidance, cache=EVERY_THIRD)
    together = generate(model, [0, 1, 2], [5, 6, 7], **settings)
    for k in range(3):
        assert largest_difference(generate(model, [k], [5 + k], **settings), together[k : k + 1]) <= 1


def test_guiding_by_another_model_each_has_its_own_features():
    model, weaker = grey_network(), grey_network(seed=1, width=16)
    settings = dict(num_steps=8, guidance=2.0, guiding_model=weaker)
    plain = generate(model, [0, 1], [5, 6], **settings)
    calls = []
    for each in (model, weaker):
        each.merges[0].register_forward_hook(lambda *_: calls.append(1))
    cached = generate(model, [0, 1], [5, 6], cache=EVERY_THIRD, **settings)
    assert len(calls) == 2 * EVERY_THIRD.full_passes(8)
    assert largest_difference(cached, plain) > 0


def test_a_cache_that_the_network_has_enabled_is_used_afresh_in_every_call():
    model = grey_network()
    expected = generate(model, [0, 1], [5, 6], num_steps=8, guidance=2.0, cache=EVERY_THIRD)
    model.enable_cache(EVERY_THIRD)
    generator = ImageGenerator(model, num_steps=8, guidance=2.0, labels=range(3))
    for _ in range(2):
        np.testing.assert_array_equal(generator([0, 1], [5, 6]), expected)
        generator([2], [9])
    model.disable_cache()
    assert largest_difference(generate(model, [0, 1], [5, 6], num_steps=8, guidance=2.0), expected) > 0


def test_unconditional_networks_and_other_sizes_have_one_too():
    model = grey_network(num_classes=0)
    settings = dict(num_steps=6, input_size=(8, 16), cache=EVERY_THIRD)
    together = generate(model, None, [5, 6, 7], **settings)
    assert largest_difference(generate(model, None, [5, 6, 7], batch_size=2, **settings), together) <= 1


@pytest.mark.parametrize(("steps", "sampler", "said"), [
    (1, "flow-euler", "interval 3 is longer than the run: the run has 1 evaluation"),
    (2, "flow-unipc", "interval 3 is longer than the run: the run has 2 evaluations"),
])
def test_runs_that_are_too_short_are_refused_before_any_work(steps, sampler, said):
    model = grey_network()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=said):
        generate(model, [0], [0], sampler=sampler, num_steps=steps, cache=EVERY_THIRD)


def test_hooked_and_compiled_networks_keep_features_too(monkeypatch):
    model = grey_network()
    settings = dict(num_steps=5, guidance=2.0, cache=EVERY_THIRD)
    expected = generate(model, [0, 1], [5, 6], **settings)
    monkeypatch.setattr(conditioning, "is_hooked", lambda network: True)
    assert largest_difference(generate(model, [0, 1], [5, 6], **settings), expected) <= 1
    torch.compiler.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    assert largest_difference(generate(model, [0, 1], [5, 6], **settings), expected) <= 1


def test_both_kinds_of_passes_are_recorded_where_graphs_are(monkeypatch):
    """With a recorder that replays nothing; tests/inference/test_cuda_graph.py has the real one."""
    model, kinds = grey_network(), []

    class Recorder:
        def __init__(self, model, x, conditioning, deep_features=None, return_features=(), constants=None):
            kinds.append((deep_features is not None, return_features))
            self._call = lambda x, c, deep: model(
                x, None, conditioning=c, deep_features=deep, return_features=return_features)

        def takes(self, x, conditioning):
            return True

        def __call__(self, x, conditioning, deep_features=None):
            return self._call(x, conditioning, deep_features)

    settings = dict(num_steps=6, guidance=2.0, cache=EVERY_THIRD)
    expected = generate(model, [0, 1], [5, 6], **settings)
    monkeypatch.setattr(conditioning, "can_record", lambda x: True)
    monkeypatch.setattr("lamamba.inference.cuda_graph.RecordedNetwork", Recorder)
    np.testing.assert_array_equal(generate(model, [0, 1], [5, 6], **settings), expected)
    assert kinds == [(False, ("deep",)), (True, ())]
