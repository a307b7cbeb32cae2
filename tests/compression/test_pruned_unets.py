from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel

from lamamba.compression.find import find_units
from lamamba.compression.pruned_unets import PrunedUNet2DConditionModel, PrunedUNet2DModel
from tests.compression.unets import CONFIGS, PLAIN, SD, SKIP, inputs_for, make, output

CHOICES = {
    "sd": ("down_blocks.0.resnets.0", "up_blocks.1.attentions", "mid_block.attentions.0.transformer_blocks.0",
           "down_blocks.0.attentions.0.transformer_blocks.1.attn2"),
    "sdxl": ("mid_block", "up_blocks.0.attentions.1", "down_blocks.1.attentions.0.transformer_blocks.0.ff"),
    "plain": ("mid_block.attentions.0", "up_blocks.0.attentions", "up_blocks.1.resnets.1"),
    "resampled": ("down_blocks.1.resnets.0", "up_blocks.0.upsamplers.0"),
    "skip": ("up_blocks.0.resnet_up", "down_blocks.0.resnet_down", "down_blocks.1.attentions.0"),
}


@pytest.mark.parametrize(("name", "size"), [(name, "10GB") for name in CONFIGS] + [("sd", "40KB")])
def test_a_saved_network_is_reloaded_to_the_bit(name, size, tmp_path, caplog):
    pruned = find_units(make(CONFIGS[name])).without(CHOICES[name])
    pruned.save_pretrained(tmp_path, max_shard_size=size)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == type(pruned).__name__
    assert config["removed_units"] == list(CHOICES[name]) or sorted(config["removed_units"]) == sorted(CHOICES[name])
    with caplog.at_level(logging.WARNING):
        loaded = type(pruned).from_pretrained(tmp_path)
    assert not caplog.records
    assert torch.equal(output(loaded), output(pruned))
    assert torch.equal(output(type(pruned).from_pretrained(tmp_path, low_cpu_mem_usage=False)), output(pruned))
    numbers = [sum(parameter.numel() for parameter in model.parameters()) for model in (loaded, pruned)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_stock_classes_refuse_every_pruned_folder(name, low_cpu_mem_usage, tmp_path):
    """They would fill what is missing with random numbers."""
    network = find_units(make(CONFIGS[name]))
    stock = UNet2DConditionModel if isinstance(network.model, UNet2DConditionModel) else UNet2DModel
    kinds = {unit.kind: unit.name for unit in network.units}
    for unit in kinds.values():
        network.without([unit]).save_pretrained(tmp_path / unit)
        with pytest.raises((ValueError, RuntimeError), match="shape"):
            stock.from_pretrained(tmp_path / unit, low_cpu_mem_usage=low_cpu_mem_usage)


def test_part_of_a_pipeline(tmp_path):
    pruned = find_units(make(PLAIN | {"num_class_embeds": None})).without(["mid_block", "down_blocks.1.resnets.0"])
    DDPMPipeline(pruned, DDPMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["lamamba.compression.pruned_unets", "PrunedUNet2DModel"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is PrunedUNet2DModel
    assert torch.equal(output(loaded.unet), output(pruned))


def test_half_precision_and_devices_of_weights():
    pruned = find_units(make(SD).half()).without(["mid_block"])
    assert {tensor.dtype for tensor in pruned.state_dict().values()} == {torch.float16}
    assert not any(tensor.is_meta for tensor in [*pruned.parameters(), *pruned.buffers()])


def test_gradients_reach_what_is_left():
    pruned = find_units(make(SD)).without(["mid_block", "up_blocks.1.resnets.0"]).train()
    pruned.enable_gradient_checkpointing()
    pruned(**inputs_for(pruned)).sample.square().mean().backward()
    lacking = [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
    assert not lacking


def test_unknown_units_in_a_configuration_are_named():
    with pytest.raises(ValueError, match=r"removed_units: unit 'mid_blok' is unknown; did you mean 'mid_block'"):
        PrunedUNet2DConditionModel(**SD, removed_units=["mid_blok"])


def test_other_modules_than_the_configuration_says_are_refused():
    model = make(SKIP)
    del model.conv_out.bias
    model.conv_out.register_parameter("bias", None)
    with pytest.raises(ValueError, match=r"no conv_out.bias .*unload or fuse adapters"):
        find_units(model).without(["mid_block"])
