"""Times of units, by a clock that products and convolutions move by the size of their weights."""

from __future__ import annotations

import time

import pytest
from torch import nn

from lamamba.compression.find import find_units
from lamamba.compression.timing import measure_times
from tests.compression.unets import CONFIGS, make, output
from tests.networks import random_inputs, random_network, small_config


@pytest.fixture
def timed(monkeypatch):
    """A function of a network, its forward pass and rounds: the times of its units."""
    now, handles = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(module, *_):
        now[0] += module.weight.numel()

    def measure(model, forward, rounds=1):
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                handles.append(module.register_forward_pre_hook(advance))
        network = find_units(model)
        return network, measure_times(network, forward, rounds=rounds)

    yield measure
    for handle in handles:
        handle.remove()


def own_weights(network, name):
    """Of the products and convolutions that are a unit's own."""
    own = {id(weight) for weight in network.own_parameters(name)}
    layers = (module for module in network.model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return sum(layer.weight.numel() for layer in layers if id(layer.weight) in own)


def test_branches_take_their_own_time_and_their_share_of_the_condition_s_projection(timed):
    model = random_network(small_config(depths=(1, 1, 1, 1), removed_blocks=("encoder.2.0.scan",))).eval()
    inputs = random_inputs(model.architecture)
    network, times = timed(model, lambda: model(*inputs))
    for unit in network.units:
        block = network._block(unit.name)[0] if unit.kind in ("scan", "attention", "mlp") else None
        rest = own_weights(network, unit.parent) - sum(
            own_weights(network, f"{unit.parent}.{name}") for name in block.branches) if block else 0
        share = rest / len(block.branches) if block else 0                      # of the condition's products
        assert times[unit.name] == pytest.approx(own_weights(network, unit.name) + share), unit.name
    assert times[""] > sum(times[unit.name] for unit in network.units if unit.parent is None)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stays_in_place_of_a_unit_is_not_its_time(timed, name):
    model = make(CONFIGS[name])
    network, times = timed(model, lambda: output(model))
    summed = {unit.name for unit in network.units if unit.is_sum}
    for unit in network.units:
        if unit.parent not in summed:
            assert times[unit.name] == pytest.approx(own_weights(network, unit.name)), unit.name
