from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from lamamba.benchmarking.flops import multiply_adds_by_module
from lamamba.compression.diffusers_units import example_inputs
from lamamba.compression.find import candidates, find_units
from lamamba.compression.plan import make_plan
from lamamba.compression.scores import by_rule
from tests.compression.unets import CONFIGS, SD, SKIP, make, output

SD_15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL_BASE = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_kinds_of_units_are_all_there():
    kinds = Counter(unit.kind for name in ("sd", "plain") for unit in candidates(make(CONFIGS[name])))
    assert set(kinds) == {
        "resnet", "transformer", "block", "self-attention", "cross-attention", "feed-forward", "attention",
        "attentions", "mid",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_and_rebuilt_agree_to_the_bit_and_costs_are_exact(name):
    model = make(CONFIGS[name])
    network, whole, before = find_units(model), output(model), count(model)
    inputs, counted = example_inputs(model.config), set()
    assert network.parameters == before
    for unit in network.units:
        pruned = network.without([unit.name])
        with network.masked([unit.name]) as masked:
            expected = output(masked)
        assert torch.equal(output(pruned), expected), unit
        assert not torch.equal(expected, whole), unit
        assert before - count(pruned) == unit.parameters > 0, unit
        if (what := (unit.kind, f"{unit.name}.conv_shortcut.weight" in model.state_dict())) not in counted:
            counted.add(what)
            left = multiply_adds_by_module(pruned.to("meta"), **inputs)[""]
            assert network.multiply_adds - left == unit.multiply_adds, unit
        assert sum(weight.numel() for weight in network.own_parameters(unit.name)) == unit.parameters
    assert torch.equal(output(model), whole)


def test_weights_are_shared_and_the_mode_is_kept():
    model = make(SD).train()
    pruned = find_units(model).without(["mid_block"])
    assert pruned.training
    assert pruned.conv_in.weight.data_ptr() == model.conv_in.weight.data_ptr()


def test_many_units_together_and_again_from_what_is_left():
    model = make(SD)
    network, generator = find_units(model), np.random.default_rng(0)
    names = [unit.name for unit in network.units]
    for _ in range(5):
        chosen = list(generator.choice(names, 8, replace=False))
        pruned = network.without(chosen)
        with network.masked(chosen) as masked:
            assert torch.equal(output(pruned), output(masked))
        assert network.parameters - count(pruned) == network.cost(chosen)[0]
        again = find_units(pruned)
        assert again.multiply_adds == network.multiply_adds - network.cost(chosen)[1]
        left = again.units[0].name
        twice = again.without([left])
        assert count(twice) == count(pruned) - again[left].parameters
        with network.masked([*chosen, left]) as masked:
            assert torch.equal(output(twice), output(masked))


def test_a_unit_that_goes_with_those_inside_it_is_their_sum():
    network = find_units(make(SD))
    sums = {unit.name for unit in network.units if unit.is_sum}
    assert {"mid_block", "up_blocks.1.attentions", "mid_block.attentions.0.transformer_blocks.1"} <= sums
    assert "mid_block.attentions.0" not in sums                                 # its norm and projections stay
    block = "mid_block.attentions.0.transformer_blocks.1"
    assert network.canonical(f"{block}.{leaf}" for leaf in ("attn1", "attn2", "ff")) == (block,)
    assert find_units(make(SKIP))["mid_block"].is_sum is False                  # its residuals are scaled


@pytest.mark.parametrize(("config", "millions", "transformer_blocks"), [(SD_15, 859.5, 16), (SDXL_BASE, 2567.5, 70)])
def test_whole_layouts_are_listed_and_planned_in_seconds(config, millions, transformer_blocks):
    began = time.process_time()
    with torch.device("meta"):
        network = find_units(UNet2DConditionModel(**config))
    scores = by_rule(network, "random", 0, {})
    plan = make_plan(scores, remove=0.5)
    assert time.process_time() - began < 30
    assert round(network.parameters / 1e6, 1) == millions
    kinds = Counter(unit.kind for unit in network.units)
    assert kinds["block"] == kinds["self-attention"] == kinds["feed-forward"] == transformer_blocks
    assert 0.5 <= plan.parameters < 0.75
    pruned = network.without(plan.removed)
    assert count(pruned) == round((1 - plan.parameters) * network.parameters)
    assert multiply_adds_by_module(pruned, **example_inputs(pruned.config))[""] == (
        network.multiply_adds - network.cost(plan.removed)[1]
    )


def test_networks_that_are_not_understood_are_refused():
    with torch.device("meta"):
        model = UNet2DConditionModel(**{
            **SD, "addition_embed_type": "image", "encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj",
        })
    with pytest.raises(ValueError, match="conditioned by images are not supported"):
        find_units(model)
    with pytest.raises(ValueError, match=r"did you mean 'mid_block'"):
        find_units(make(SD)).without(["mid_blok"])
