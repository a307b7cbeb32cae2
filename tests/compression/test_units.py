"""Units of LaMamba networks: exact costs; masked, rebuilt and reloaded networks agree to the bit."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamamba.benchmarking.flops import count
from lamamba.compression.find import candidates, find_units
from lamamba.models.unet import LaMambaUNet
from tests.networks import random_network, small_config

REMOVED = (
    "encoder.2.0.scan", "encoder.3.0", "decoder.0.0.mlp", "decoder.0.1", "decoder.1.0", "decoder.1.1", "decoder.2.0",
    "decoder.3.1",
)
CONFIG = small_config(depths=(1, 1, 1, 1), removed_blocks=REMOVED)
"""Few units, for the time of a test; some of a block are removed already."""


@pytest.fixture(scope="module")
def network():
    return random_network(CONFIG).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, CONFIG.in_channels, *CONFIG.input_size, generator=generator)
    return x, torch.tensor([3.0, 700.0]), torch.tensor([0, CONFIG.num_classes])


counted = functools.cache(count)


def saved_by(config, names):
    whole, pruned = counted(config), counted(config.replace(removed_blocks=(*config.removed_blocks, *names)))
    return whole.parameters - pruned.parameters, whole.matrix - pruned.matrix


@pytest.fixture(autouse=True)
def _no_gradients():
    """The compiled kernels of inference differ from those of training in the last bits."""
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", ["scan", "attention", "mlp", "block", "bottleneck"])
def test_units_save_exactly_what_they_say(network, kind):
    for unit in [unit for unit in candidates(network) if unit.kind == kind][-2:]:
        assert saved_by(CONFIG, [unit.name]) == (unit.parameters, unit.multiply_adds), unit.name


def test_units_are_every_branch_and_block_and_the_bottleneck(network):
    blocks = [name for name in CONFIG.removable_names() if name != "bottleneck" and CONFIG.branches(name)]
    blocks = [name for name in blocks if name.count(".") == 1 + (not name.startswith("bottleneck"))]
    branches = [f"{block}.{branch}" for block in blocks for branch in CONFIG.branches(block)]
    assert sorted(unit.name for unit in candidates(network)) == sorted(["bottleneck", *blocks, *branches])


@pytest.mark.parametrize("kind", ["scan", "attention", "mlp", "block", "bottleneck"])
def test_masked_rebuilt_and_reloaded_agree_to_the_bit(network, inputs, kind, tmp_path):
    units = find_units(network)
    names = [unit.name for unit in units.units if unit.kind == kind][:1]
    with units.masked(names) as masked:
        expected = masked(*inputs)
    pruned = units.without(names)
    pruned.save_pretrained(tmp_path)
    assert not torch.equal(network(*inputs), expected)
    assert torch.equal(pruned(*inputs), expected)
    assert torch.equal(LaMambaUNet.from_pretrained(tmp_path)(*inputs), expected)
    assert sum(p.numel() for p in pruned.parameters()) == units.parameters - units.cost(names)[0]


@settings(max_examples=3, deadline=None)
@given(st.data())
def test_any_set_agrees_to_the_bit_and_costs_what_it_says(network, inputs, data):
    units = find_units(network)
    names = data.draw(st.lists(st.sampled_from([unit.name for unit in units.units]), max_size=12))
    with units.masked(names) as masked:
        expected = masked(*inputs)
    pruned = units.without(names)
    assert torch.equal(pruned(*inputs), expected)
    assert saved_by(CONFIG, [n for n in pruned.architecture.removed_blocks if n not in REMOVED]) == units.cost(names)


def test_a_block_is_the_sum_of_its_branches(network):
    branches = [f"encoder.0.0.{branch}" for branch in ("scan", "attention", "mlp")]
    assert find_units(network).canonical(branches) == ("encoder.0.0",)
    assert find_units(network).canonical([*branches[:2], "encoder.0.0"]) == ("encoder.0.0",)


def test_a_pruned_network_is_pruned_again(network, inputs):
    once = find_units(network).without(["encoder.1.0.scan", "decoder.2.1"])
    twice = find_units(once).without(["encoder.1.0.mlp", "bottleneck"])
    names = ["encoder.1.0.scan", "encoder.1.0.mlp", "decoder.2.1", "bottleneck"]
    assert torch.equal(twice(*inputs), find_units(network).without(names)(*inputs))


def test_masks_leave_nothing_behind(network, inputs):
    before = network(*inputs)
    with pytest.raises(RuntimeError, match="stop"), find_units(network).masked(["encoder.0.0.scan", "bottleneck"]):
        raise RuntimeError("stop")
    assert torch.equal(network(*inputs), before)


def test_unknown_units_and_networks_are_refused(network):
    with pytest.raises(ValueError, match="did you mean 'encoder.0.0.scan'"):
        find_units(network).without(["encoder.0.0.scam"])
    with pytest.raises(ValueError, match="Linear is neither"):
        find_units(torch.nn.Linear(2, 2))
