"""Deep features: returned, given back, extrapolated; a loop of one's own with diffusers' cache_context."""

from __future__ import annotations

import diffusers
import pytest
import torch

from lamamba import LaMambaCacheConfig
from lamamba.config import STAGES
from lamamba.models.deep_cache import DeepFeatureCache
from tests.networks import random_inputs, random_network, small_config, two_blocks


@pytest.mark.parametrize(("values", "said"), [
    ({"interval": 0}, "interval=0 must be a whole number"), ({"interval": 2.5}, "interval=2.5"),
    ({"warm_up": 0}, "warm_up=0"), ({"order": 2}, "order=2 must be 1"), ({"order": True}, "order=True"),
])
def test_numbers_out_of_range_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        LaMambaCacheConfig(**values)


@pytest.mark.parametrize(("values", "evaluations", "full"), [
    ({}, 28, 11), ({"interval": 2}, 8, 5), ({"interval": 1}, 8, 8), ({"interval": 3, "warm_up": 5}, 28, 13),
    ({"interval": 4, "order": 0, "warm_up": 1}, 9, 3), ({"order": 1, "warm_up": 1}, 5, 3), ({"interval": 40}, 45, 9),
])
def test_how_many_passes_are_full(values, evaluations, full):
    config = LaMambaCacheConfig(**values)
    cache = DeepFeatureCache(config)
    done = 0
    for time in range(evaluations, 0, -1):
        if cache.extrapolate(float(time), 1) is None:
            cache.keep(torch.zeros(1, 2))
            done += 1
    assert done == config.full_passes(evaluations) == full
    config.check_run(evaluations)


@pytest.mark.parametrize(("values", "evaluations", "said"), [
    ({}, 1, "interval 3 is longer than the run: the run has 1 evaluation of the network"),
    ({"interval": 9}, 8, "interval 9 is longer than the run: the run has 8 evaluations"),
    ({"interval": 2}, 2, "nothing to reuse: the run has 2 evaluations .* the first 2 are always full"),
    ({"warm_up": 6}, 6, "the first 6 are always full"),
])
def test_runs_that_are_too_short_are_refused(values, evaluations, said):
    with pytest.raises(ValueError, match=said):
        LaMambaCacheConfig(**values).check_run(evaluations)
    LaMambaCacheConfig(**{**values, "interval": 1}).check_run(evaluations)


def test_order_one_is_exact_for_what_changes_linearly_in_time_and_order_zero_repeats():
    slope, start = torch.randn(2, 2, 3)
    for order in (0, 1):
        cache = DeepFeatureCache(LaMambaCacheConfig(interval=3, order=order))
        full = []
        for time in (1000.0, 931.0, 800.0, 750.0, 600.0, 420.0, 300.0):
            deep = cache.extrapolate(time, 2)
            if deep is None:
                full.append(time)
                cache.keep(start + time * slope)
            else:
                at = time if order else full[-1]
                torch.testing.assert_close(deep, start + at * slope, rtol=1e-4, atol=1e-3)
        assert full == [1000.0, 931.0, 750.0, 300.0]


def test_of_two_passes_at_one_time_the_later_counts():
    """Heun's second evaluation of a step comes at the time of the next one's first. Order 1 waits for two times."""
    cache = DeepFeatureCache(LaMambaCacheConfig(interval=2))
    for time, value in ((900.0, 9.0), (800.0, 99.0), (800.0, 8.0)):
        if cache.extrapolate(time, 1) is None:
            cache.keep(torch.tensor([value]))
    assert cache.extrapolate(700.0, 1) is None
    cache.keep(torch.tensor([7.0]))
    torch.testing.assert_close(cache.extrapolate(600.0, 1), torch.tensor([7.0 - 92.0]))     # from 99 at 800, 7 at 700
    cache.reset()
    for value in (99.0, 8.0, 7.0):
        assert cache.extrapolate(700.0 if value == 7 else 800.0, 1) is None
        cache.keep(torch.tensor([value]))
    torch.testing.assert_close(cache.extrapolate(600.0, 1), torch.tensor([6.0]))
    same = DeepFeatureCache(LaMambaCacheConfig(interval=9))
    for value in (5.0, 6.0):
        assert same.extrapolate(900.0, 1) is None                               # one time gives no slope
        same.keep(torch.tensor([value]))
    assert same.extrapolate(800.0, 1) is None


def test_each_guidance_branch_begins_for_itself():
    cache = DeepFeatureCache(LaMambaCacheConfig(interval=9))
    cache.reset(images=2)
    rows = {2: torch.tensor([1.0, 2.0]), 4: torch.tensor([1.0, 2.0, 3.0, 4.0])}
    seen = []
    for time, count in zip(range(9, 0, -1), (2, 2, 2, 4, 4, 4, 2, 2, 2), strict=True):
        deep = cache.extrapolate(float(time), count)
        seen.append(deep is None)
        if deep is None:
            cache.keep(rows[count])
        else:
            torch.testing.assert_close(deep, rows[count])
    assert seen == [True, True, False, True, True, False, False, False, True]


def test_a_time_above_the_last_begins_anew():
    cache = DeepFeatureCache(LaMambaCacheConfig())
    seen = []
    for time in (900.0, 800.0, 700.0, 900.0, 800.0, 700.0):
        seen.append(cache.extrapolate(time, 1) is None)
        if seen[-1]:
            cache.keep(torch.zeros(1))
    assert seen == [True, True, False] * 2


@pytest.mark.parametrize("changes", [{}, {"removed_blocks": ("bottleneck", "encoder.1.0", "decoder.3.0")}])
def test_features_by_name_are_those_of_the_layers(changes):
    model = random_network(small_config(**changes))
    x, t, labels = random_inputs(model.architecture)
    blocks = [f"{stage.name}.{i}" for stage in model._stages() for i in stage.blocks]
    hooked = {}
    for stage in model._stages():
        for i, block in stage.blocks.items():
            block.register_forward_hook(lambda _, inputs, y, name=f"{stage.name}.{i}": hooked.__setitem__(name, y))
    with torch.no_grad():
        plain = model(x, t, labels)
        output, features = model(x, t, labels, return_features=[*STAGES, *blocks, "deep"])
        _, stages = model(x, t, labels, return_features=True)
        _, one = model(x, t, labels, return_features="encoder.2")
    assert torch.equal(output, plain)
    assert set(features) == {*STAGES, *blocks, "deep"}
    assert all(torch.equal(features[name], hooked[name]) for name in blocks)
    assert all(torch.equal(features[name], y) for name, y in zip(STAGES, stages, strict=True))
    assert list(one) == ["encoder.2"]


def test_the_deep_feature_given_back_gives_the_same_output_without_the_depths():
    model = random_network(small_config())
    x, t, labels = random_inputs(model.architecture)
    with torch.no_grad():
        output, features = model(x, t, labels, return_features=["deep"])
        model.merges[0].linear.weight.fill_(float("nan"))                       # is not used
        assert torch.equal(model(x, t, labels, deep_features=features["deep"]), output)
        _, outer = model(x, t, labels, deep_features=features["deep"], return_features=["encoder.0.1", "decoder.3"])
        assert set(outer) == {"encoder.0.1", "decoder.3"}


@pytest.mark.parametrize(("arguments", "said"), [
    ({"return_features": ["encoder.7"]}, "feature 'encoder.7' is unknown"),
    ({"deep_features": torch.zeros(2, 4, 4, 32)}, r"deep_features has shape \(2, 4, 4, 32\), x needs \(2, 8, 8, 16\)"),
    ({"deep_features": torch.zeros(2, 8, 8, 16), "return_features": ["bottleneck"]}, "bottleneck are not"),
    ({"deep_features": torch.zeros(2, 8, 8, 16), "return_features": True}, "are not computed"),
])
def test_features_that_do_not_fit_are_refused(arguments, said):
    model = random_network(small_config())
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        model(*random_inputs(model.architecture), **arguments)


def loop(model, x, labels, times):
    """Passes over two branches as diffusers' pipelines make them."""
    outputs = []
    for time in times:
        for name, label in (("cond", labels), ("uncond", torch.full_like(labels, 3))):
            with model.cache_context(name):
                outputs.append(model(x, torch.full((len(x),), time), label))
            x = x - 0.1 * outputs[-1][:, : x.shape[1]]
    return torch.stack(outputs)


def test_a_loop_of_ones_own_names_the_branches():
    model = random_network(small_config())
    x, _, labels = random_inputs(model.architecture)
    times = (900.0, 700.0, 500.0, 300.0, 100.0)
    calls = []
    model.merges[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        plain = loop(model, x, labels, times)
        assert len(calls) == 10
        model.enable_cache(LaMambaCacheConfig(interval=1))
        assert model.is_cache_enabled
        assert torch.equal(loop(model, x, labels, times), plain)
        with pytest.raises(ValueError, match="enabled already: call disable_cache"):
            model.enable_cache(LaMambaCacheConfig())
        model.disable_cache()
        model.enable_cache(LaMambaCacheConfig(interval=3))
        calls.clear()
        cached = loop(model, x, labels, times)
        assert len(calls) == 6                                                  # of ten, three of each branch
        assert torch.equal(cached[:4], plain[:4])                               # the warm-up
        assert not torch.equal(cached, plain)
        assert torch.equal(loop(model, x, labels, times), cached)               # a run begins at the highest time
        with model.cache_context("cond"):
            model(x, 50.0, labels)
            model._reset_stateful_cache()
            with pytest.raises(ValueError, match="one time for all images"):
                model(x, torch.tensor([30.0, 20.0]), labels)
            with pytest.raises(ValueError, match="needs the time"):
                model(x, None, conditioning=model.condition(20.0, labels))
        model.disable_cache()
        assert torch.equal(loop(model, x, labels, times), plain)


def test_both_kinds_of_passes_compile_into_one_graph():
    model = random_network(two_blocks())
    x, t, labels = random_inputs(model.architecture)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        output, features = model(x, t, labels, return_features=("deep",))
        again, kept = compiled(x, t, labels, return_features=("deep",))
        torch.testing.assert_close(again, output)
        torch.testing.assert_close(compiled(x, t, labels, deep_features=kept["deep"]), output)
        torch.testing.assert_close(kept["deep"], features["deep"])


@pytest.mark.parametrize("name", [
    "FirstBlockCacheConfig", "MagCacheConfig", "PyramidAttentionBroadcastConfig", "FasterCacheConfig",
    "TaylorSeerCacheConfig",
])
def test_caches_of_transformers_are_refused_by_name(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    model = random_network(two_blocks())
    config = getattr(diffusers, name).__new__(getattr(diffusers, name))
    with pytest.raises(ValueError, match=f"{name} is for transformers .* use lamamba.LaMambaCacheConfig"):
        model.enable_cache(config)
    assert not model.is_cache_enabled


def test_another_attention_backend_is_refused_and_repeated_blocks_compile():
    model = random_network(two_blocks())
    with pytest.raises(ValueError, match="set_attention_backend\\('flash'\\) is for diffusers' attention classes"):
        model.set_attention_backend("flash")
    inputs = random_inputs(model.architecture)
    with torch.no_grad():
        expected = model(*inputs)
        torch.compiler.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(*inputs), expected)
