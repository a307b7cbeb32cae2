"""What diffusers' own ModelTesterMixin and PipelineTesterMixin check, checked here: its wheel holds no tests.

Every fact of theirs is tested below or elsewhere (ELSEWHERE), but for these:

    attention processors, slicing, xformers, fused QKV      attention over windows is no class of diffusers
    context and tensor parallelism                          there is no plan for them: FSDP2 splits networks in training
    weights of other shapes (ignore_mismatched_sizes)       loading is strict
    pickles (safe_serialization=False)                      only safetensors are written and read
    requests to a hub, files in its cache                   diffusers' own; tests here use no network
    deprecated attributes of configurations                 there never were any
    modules kept in float32                                 states are float32 in the scan, whatever the weights are
    prompts, textual inversion, IP adapters, ControlNets    there are no prompts, and those are for diffusers' networks
    memory figures of casting and offloading                need a GPU; diffusers' own code moves the tensors
    one compiled graph for several shapes                   networks compile for one shape (dynamic=False), by choice
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from lamamba import LaMambaPipeline, LaMambaUNet
from tests.networks import random_inputs, random_network, small_config, two_blocks
from tests.test_pipeline import make_pipeline, run, seeds

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "whole": small_config(), "pruned": two_blocks(), "unconditional": two_blocks(num_classes=0),
    "flow map": two_blocks(objective="flow-map", guidance_range=(1.0, 4.0)),
}

ELSEWHERE = {
    "determinism": "tests/models/test_unet.py::test_output_is_independent_of_the_batch_size",
    "sharded checkpoints": "tests/models/test_unet.py::test_in_shards",
    "variants, device maps, dtypes of a pipeline": "tests/test_pipeline.py::test_ways_to_load",
    "disk offload": "tests/test_pipeline.py::test_ways_to_load",
    "CPU offload, of modules and whole": "tests/test_pipeline.py::test_offloaded_networks_make_the_same_images",
    "group offloading, also to disk": "tests/test_pipeline.py::test_groups_on_disk_make_the_same_images",
    "layerwise casting": "tests/test_pipeline.py::test_weights_stored_in_eight_bits",
    "quantisation": "tests/test_pipeline.py::test_quantised_by_torchao",
    "pushing to a hub": "tests/test_pipeline.py::test_it_is_pushed_to_a_hub_whole",
    "torch.compile in one graph": "tests/models/test_unet.py::test_agrees_with_eager",
    "compile_repeated_blocks": (
        "tests/models/test_deep_cache.py::test_another_attention_backend_is_refused_and_repeated_blocks_compile"),
    "caches, enabled and disabled": "tests/models/test_deep_cache.py::test_a_loop_of_ones_own_names_the_branches",
    "LoRA, saved and loaded": "tests/models/test_adapters.py::test_saved_and_loaded_again_it_is_the_same",
    "LoRA, a wrong adapter name": "tests/models/test_adapters.py::test_saved_and_loaded_again_it_is_the_same",
    "LoRA, swapped in place": "tests/models/test_adapters.py::test_an_adapter_is_swapped_in_place",
    "FirstBlockCache, MagCache, PAB, FasterCache, TaylorSeer": (
        "tests/models/test_deep_cache.py::test_caches_of_transformers_are_refused_by_name"),
    "saving and loading a pipeline": "tests/test_pipeline.py::test_a_saved_pipeline_makes_the_same_images",
    "optional components": "tests/test_pipeline.py::test_a_saved_pipeline_makes_the_same_images",
    "custom code of a pipeline": "tests/test_pipeline.py::test_diffusers_alone_loads_it_with_the_code_beside_it",
    "batches, consistent and single": (
        "tests/test_pipeline.py::test_it_makes_what_lamamba_sample_makes_at_any_batch_size"),
    "output types, tuple and object": "tests/test_pipeline.py::test_every_output_type",
    "images for each label": "tests/test_pipeline.py::test_labels_by_number_name_and_word",
    "float16 and bfloat16 pipelines": "tests/test_pipeline.py::test_copies",
    "callbacks see, and change, tensors": "tests/test_pipeline.py::test_callbacks_see_and_change_the_steps",
    "callbacks and guidance": "tests/test_pipeline.py::test_a_callback_changes_the_guidance",
    "guidance of one is no guidance": "tests/test_pipeline.py::test_guidance_reaches_the_network",
    "slicing and tiling of the autoencoder": "tests/test_pipeline.py::test_slices_and_tiles_of_the_vae_change_little",
    "GPUs": "tests/test_pipeline.py::test_on_a_gpu",
}
@pytest.mark.parametrize("name", sorted(set(ELSEWHERE.values())))
def test_the_tests_elsewhere_exist(name):
    path, function = name.split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def inputs(config):
    x, t, y = random_inputs(config)
    arguments = dict(x=x, timestep=t, class_labels=y)
    if config.objective == "flow-map":
        arguments |= dict(end_timestep=t / 2, guidance_scale=torch.tensor([1.5, 3.0]))
    return arguments


@pytest.fixture(params=CONFIGS)
def network(request):
    return random_network(CONFIGS[request.param])


def call(model, **changes):
    with torch.no_grad():
        return model(**inputs(model.architecture) | changes)


def test_the_output_has_the_inputs_shape_and_comes_as_tensor_tuple_or_object(network):
    output = call(network)
    config = network.architecture
    assert output.shape == (2, config.output_channels // config.patch_size**2, *config.input_size)
    assert torch.equal(call(network, return_dict=True).sample, output)
    (only,) = call(network, return_dict=False)
    assert torch.equal(only, output)
    assert list(inspect.signature(network.forward).parameters)[:3] == ["x", "timestep", "class_labels"]


def test_a_saved_network_is_loaded_in_evaluation_mode_with_the_same_bits_and_configuration(network, tmp_path):
    network.train().save_pretrained(tmp_path)
    for kwargs in ({}, dict(low_cpu_mem_usage=False), dict(device_map="cpu"), dict(use_safetensors=True)):
        again, info = LaMambaUNet.from_pretrained(tmp_path, output_loading_info=True, **kwargs)
        assert not again.training
        assert not any(info.values())
        assert torch.equal(call(again), call(network.eval()))
        assert again.architecture == network.architecture
    fresh = LaMambaUNet.from_config(LaMambaUNet.load_config(tmp_path))
    assert fresh.architecture == network.architecture
    assert not torch.equal(fresh.head.linear.weight, network.head.linear.weight)
    assert {key for key in json.loads((tmp_path / "config.json").read_text()) if key.startswith("_")} <= {
        "_class_name", "_diffusers_version", "_name_or_path"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_those_that_are_named(network, tmp_path, dtype):
    torch.nn.Module.to(network, dtype).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {dtype}
    for kwargs in (dict(torch_dtype=dtype), dict(dtype=dtype), dict(dtype=dtype, low_cpu_mem_usage=False)):
        again = LaMambaUNet.from_pretrained(tmp_path, **kwargs)
        assert again.dtype == dtype
        assert all(map(torch.equal, again.parameters(), network.parameters()))


def test_variants_lie_side_by_side(network, tmp_path):
    network.save_pretrained(tmp_path, variant="ema")
    with torch.no_grad():
        network.head.linear.bias.add_(1)
    network.save_pretrained(tmp_path)
    plain, ema = LaMambaUNet.from_pretrained(tmp_path), LaMambaUNet.from_pretrained(tmp_path, variant="ema")
    difference = call(plain) - call(ema)
    torch.testing.assert_close(difference, torch.ones_like(difference), atol=1e-5, rtol=1e-5)
    with pytest.raises(OSError, match="fp16"):
        LaMambaUNet.from_pretrained(tmp_path, variant="fp16")


def test_weights_of_other_shapes_are_refused_whatever_is_to_be_ignored(tmp_path):
    random_network(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of another shape: .*label_embedding.weight"):
        LaMambaUNet.from_pretrained(tmp_path, num_classes=5, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match="use_safetensors=False: weights as a pickle"):
        LaMambaUNet.from_pretrained(tmp_path, use_safetensors=False)


def test_device_maps_by_name_and_by_dictionary(network, tmp_path):
    expected = call(network)
    network.save_pretrained(tmp_path)
    for given in ("auto", "balanced", {"": "cpu"}, {"": torch.device("cpu")}):
        again = LaMambaUNet.from_pretrained(tmp_path, device_map=given)
        assert torch.equal(call(again), expected)
    for wrong in ("wrong", -1, {"encoder": "cpu"}):
        with pytest.raises((ValueError, RuntimeError)):
            LaMambaUNet.from_pretrained(tmp_path, device_map=wrong)


def test_a_network_trains_and_diffusers_average_follows(network):
    network.train()
    ema = EMAModel(network.parameters(), decay=0.5)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    network(**inputs(network.architecture)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    optimizer.step()
    ema.step(network.parameters())
    ema.copy_to(network.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in network.parameters())


def test_gradient_checkpointing_is_switched_and_gives_the_same_gradients(network):
    network.train()
    gradients = []
    for checkpointed in (False, True, False):
        network.enable_gradient_checkpointing() if checkpointed else network.disable_gradient_checkpointing()
        assert network.is_gradient_checkpointing is checkpointed
        network.zero_grad()
        network(**inputs(network.architecture)).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for first, second, third in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first, atol=1e-6, rtol=1e-5)
        assert torch.equal(third, first)


def test_layerwise_casting_trains(network):
    """The weights that are not cast (those that modules of ours read) have gradients; the others are of eight bits."""
    network.train().enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    loss = network(**inputs(network.architecture)).square().mean()
    loss.backward()
    assert loss.isfinite()


def test_deepcopies_are_independent(network):
    again = copy.deepcopy(network)
    with torch.no_grad():
        again.head.linear.bias.add_(1)
    assert not torch.equal(call(again), call(network))


def test_numbers_of_parameters_devices_and_dtypes_are_told(network):
    assert network.num_parameters() == sum(p.numel() for p in network.parameters())
    assert (network.device, network.dtype) == (torch.device("cpu"), torch.float32)
    assert network.get_memory_footprint() >= 4 * network.num_parameters()


def test_auto_model_finds_the_network_in_a_pipeline_once_the_class_is_imported(tmp_path):
    """A network's own folder holds no code and its class is not diffusers': that is refused by diffusers itself."""
    pipe = make_pipeline("ddim", objective="noise")
    pipe.save_pretrained(tmp_path)
    found = AutoModel.from_pretrained(str(tmp_path), subfolder="unet")
    assert isinstance(found, LaMambaUNet)
    assert all(map(torch.equal, found.parameters(), pipe.unet.parameters()))
    for kwargs in ({}, dict(trust_remote_code=True)):
        with pytest.raises((ValueError, AttributeError)):
            AutoModel.from_pretrained(str(tmp_path / "unet"), **kwargs)


def test_switches_of_attention_change_nothing_or_are_refused():
    pipe = make_pipeline("ddim", objective="noise")
    plain = run(pipe)
    pipe.enable_attention_slicing()
    assert torch.equal(run(pipe), plain)
    with pytest.raises(ValueError, match="is for diffusers' attention classes"):
        pipe.unet.set_attention_backend("native")


def test_a_pipeline_is_called_by_names_that_it_knows():
    names = list(inspect.signature(LaMambaPipeline.__call__).parameters)
    assert names[1] == "class_labels"
    assert {"num_inference_steps", "guidance_scale", "generator", "latents", "output_type", "return_dict", "height",
            "width", "callback_on_step_end", "callback_on_step_end_tensor_inputs"} <= set(names)


def test_components_make_another_pipeline_of_the_same_parts():
    pipe = make_pipeline("ddim", objective="noise")
    init = set(inspect.signature(LaMambaPipeline.__init__).parameters) - {"self"}
    assert set(pipe.components) <= init
    again = LaMambaPipeline(**pipe.components)
    assert again.unet is pipe.unet
    assert torch.equal(run(again), run(pipe))


def test_the_progress_bar_counts_the_steps(capsys):
    pipe = make_pipeline("ddim", objective="noise")
    pipe(1, num_inference_steps=3, generator=seeds(1))
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(1, num_inference_steps=3, generator=seeds(1))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("vae", [False, True])
def test_a_dtype_for_each_component(tmp_path, vae):
    from tests.autoencoders import make_kl

    pipe = make_pipeline("ddim", make_kl() if vae else None, objective="noise")
    pipe.save_pretrained(tmp_path)
    again = LaMambaPipeline.from_pretrained(
        tmp_path, torch_dtype={"unet": torch.bfloat16, "vae": torch.float16, "default": torch.float32})
    assert again.unet.dtype == torch.bfloat16
    assert again.vae is None or again.vae.dtype == torch.float16


def test_variants_of_a_pipeline_that_are_missing_are_named(tmp_path):
    make_pipeline("ddim", objective="noise").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=fp16"):
        LaMambaPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_pipeline_moves_and_casts_its_parts():
    pipe = make_pipeline("ddim", objective="noise")
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert pipe.to("meta").device == torch.device("meta")


def test_group_offload_of_a_whole_pipeline():
    pipe = make_pipeline("ddim", objective="noise")
    if not hasattr(pipe, "enable_group_offload"):
        pytest.skip("this diffusers has no group offload of pipelines")
    plain = run(pipe)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(run(pipe), plain, atol=1e-5, rtol=0)


def test_pipelines_of_the_same_folder_share_nothing(tmp_path):
    make_pipeline("ddim", objective="noise").save_pretrained(tmp_path)
    first, second = (LaMambaPipeline.from_pretrained(tmp_path) for _ in range(2))
    assert isinstance(first, DiffusionPipeline)
    with torch.no_grad():
        first.unet.head.linear.bias.add_(1)
    assert not np.array_equal(run(first), run(second))


def test_diffusers_lists_are_complete():
    """A feature that a newer diffusers gives every model must be tested, or refused, here: see the table in docs."""
    known = {
        "add_adapter", "enable_cache", "enable_group_offload", "enable_gradient_checkpointing",
        "enable_layerwise_casting", "enable_parallelism", "enable_xformers_memory_efficient_attention",
        "enable_npu_flash_attention", "enable_xla_flash_attention", "enable_adapters", "enable_lora",
        "enable_lora_hotswap", "enable_tensor_parallelism",
    }
    offered = {name for name in dir(LaMambaUNet) if name.startswith(("enable_", "add_adapter"))}
    assert offered <= known, f"new in diffusers {diffusers.__version__}: {offered - known}"
