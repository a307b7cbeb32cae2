from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from lamamba.compression.find import find_units
from lamamba.compression.plan import make_plan
from lamamba.compression.scores import by_rule
from lamamba.compression.stock_unets import stock_model, stock_units, zero_filled
from tests.compression.unets import CONFIGS, PLAIN, SD, SDXL, SKIP, make, output

BLOCK = "transformer_blocks"
SAID = {
    "sd": {
        "mid_block", "down_blocks.0.attentions.0", "up_blocks.1.attentions",
        *(f"{stage}.attentions.{number}.{BLOCK}.{block}" for block in (0, 1)
          for stage, number in [("down_blocks.0", 0), ("mid_block", 0), ("up_blocks.1", 0), ("up_blocks.1", 1)]),
    },
    "sdxl": {
        "mid_block", "down_blocks.1.attentions.0", "up_blocks.0.attentions",
        *(f"up_blocks.0.attentions.{number}.{BLOCK}.{block}" for block in (0, 1) for number in (0, 1)),
    },
    "plain": {"mid_block", "mid_block.attentions.0", "down_blocks.1.attentions.0", "up_blocks.0.attentions"},
    "resampled": {"mid_block", "mid_block.attentions.0"},
    "skip": {"mid_block"},
}


def check_stock(network, removed, folder):
    """The folder opens in stock diffusers, and computes what the masked network does."""
    stock_model(network.model, removed).save_pretrained(folder)
    stock = UNet2DConditionModel if isinstance(network.model, UNet2DConditionModel) else UNet2DModel
    loaded, info = stock.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is stock
    assert not any(info.values())
    with network.masked(removed) as masked:
        assert torch.equal(output(loaded), output(masked)), removed
    left = sum(parameter.numel() for parameter in loaded.parameters())
    assert network.parameters - left == network.cost(removed)[0]


@pytest.mark.parametrize("name", SAID)
def test_what_stock_configurations_say_opens_in_stock_diffusers_without_difference(name, tmp_path):
    network = find_units(make(CONFIGS[name]))
    allowed = stock_units(network.model)
    assert set(allowed) == SAID[name]
    check_stock(network, allowed, tmp_path / "all")
    generator = np.random.default_rng(0)
    for number in range(4):
        chosen = [unit for unit in allowed if generator.random() < 0.4]
        check_stock(network, chosen, tmp_path / str(number))


@pytest.mark.parametrize(("config", "removed"), [
    (SD, ["mid_block.attentions.0", "mid_block.resnets.1"]),
    (SDXL, [f"mid_block.attentions.0.{BLOCK}.0", f"down_blocks.1.attentions.0.{BLOCK}.1"]),
    (SDXL, [f"down_blocks.1.attentions.0.{BLOCK}.0", "mid_block"]),
    (SDXL, ["down_blocks.1.attentions.0", f"mid_block.attentions.0.{BLOCK}.0"]),
], ids=["attention and second resnet of the middle", "as many in both", "middle goes", "last down block without"])
def test_what_stock_configurations_say_of_several_units(config, removed, tmp_path):
    check_stock(find_units(make(config)), removed, tmp_path)


@pytest.mark.parametrize(("config", "removed", "message"), [
    (SD, ["down_blocks.0.resnets.0"], r"leaves out down_blocks.0.resnets.0 \(resnet\) alone"),
    (SD, ["up_blocks.1.attentions.1"], r"up_blocks.1.attentions.1 \(transformer\) alone"),
    (SD, [f"up_blocks.1.attentions.1.{BLOCK}.0.ff"], r"\(feed-forward\) alone"),
    (SD, ["mid_block.attentions.0"], "attentions of mid_block alone"),
    (SDXL, [f"mid_block.attentions.0.{BLOCK}.0"], r"would have 1 transformer blocks, .* down block 2"),
    (PLAIN, ["up_blocks.0.attentions.0"], r"UNet2DModel leaves out up_blocks.0.attentions.0 \(attention\)"),
    (SKIP, ["mid_block.attentions.0"], "attentions of mid_block alone"),
    (SD, ["mid_blok"], "did you mean"),
])
def test_what_no_stock_configuration_says_is_refused_with_the_unit(config, removed, message):
    with pytest.raises(ValueError, match=message):
        stock_model(make(config), removed)


def test_a_pruned_network_becomes_a_stock_one(tmp_path):
    network = find_units(make(SD))
    first, then = [f"up_blocks.1.attentions.0.{BLOCK}.0"], "mid_block"
    pruned = network.without(first)
    assert set(stock_units(pruned)) == SAID["sd"] - set(first)
    with network.masked([*first, then]) as masked:
        assert torch.equal(output(stock_model(pruned, [then])), output(masked))


def test_plans_keep_to_what_stock_configurations_say():
    network = find_units(make(SDXL))
    plan = make_plan(by_rule(network, "random", 0, {}), remove=0.4, allowed=stock_units(network.model))
    left = sum(parameter.numel() for parameter in stock_model(network.model, plan.removed).parameters())
    assert left == round((1 - plan.parameters) * network.parameters)


@pytest.mark.parametrize("name", CONFIGS)
def test_filled_with_zeros_a_stock_network_computes_what_the_pruned_one_does(name):
    network = find_units(make(CONFIGS[name]))
    units = [unit for unit in network.units if unit.kind != "mid" or name != "skip"]
    kinds = {unit.kind: unit.name for unit in units}
    for removed in [[unit] for unit in kinds.values()] + [network.canonical(kinds.values())]:
        zeros = zero_filled(network.model, removed)
        assert type(zeros) in (UNet2DModel, UNet2DConditionModel)
        with network.masked(removed) as masked:
            assert torch.equal(output(zeros), output(masked)), removed


def test_zeros_cannot_say_everything():
    with pytest.raises(ValueError, match="mid_block_scale_factor"):
        zero_filled(make(SKIP), ["mid_block"])
    with pytest.raises(ValueError, match="whole network"):
        zero_filled(find_units(make(SD)).without(["mid_block"]), ["up_blocks.0.resnets.0"])
