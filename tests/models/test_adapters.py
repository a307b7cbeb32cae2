"""LoRA: every target changes the output and learns, all fast paths honour it, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lamamba import LaMambaCacheConfig, LaMambaUNet
from lamamba.compression.lamamba_units import LaMambaUnits
from lamamba.diffusion.guidance import Guidance
from lamamba.inference import packing
from lamamba.inference.packing import PackedLinear, can_pack, pack_weights
from lamamba.inference.quantizing import is_quantized
from lamamba.models.adapters import BLOCK_PRODUCTS, LORA_FILE, LORA_SETTINGS, find_targets, read_settings
from lamamba.sampling import generate
from lamamba.sampling.generate import GuidedModel
from lamamba.utils.tensors import read_tensors
from tests.networks import largest_difference, random_inputs, random_network, relative_error, small_config, two_blocks

pytest.importorskip("peft", reason="needs peft")

CONFIGS = {
    "whole": small_config(), "pruned": two_blocks(),
    "flow map": two_blocks(objective="flow-map", guidance_range=(1.0, 4.0)),
}


def settings(targets=BLOCK_PRODUCTS, **more):
    """Of an adapter that is not zero at first."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": list(targets), "init_lora_weights": False, **more})


def adapted(config=CONFIGS["whole"], targets=BLOCK_PRODUCTS, seed=0, **more):
    model = random_network(config, seed)
    torch.manual_seed(seed + 7)
    model.add_adapter(settings(find_targets(dict(model.named_modules()), targets), **more))
    return model.eval()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layers(config):
    model = random_network(config)
    return find_targets(dict(model.named_modules()), {name.rpartition(".")[2] for name, module in (
        model.named_modules()) if isinstance(module, nn.Linear | nn.Embedding) or name.endswith("projection")})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_can_have_a_lora_that_changes_the_output_and_learns(name):
    config = CONFIGS[name]
    x, t, y = random_inputs(config)
    more = dict(end_timestep=t / 2, guidance_scale=2.0) if name == "flow map" else {}
    targets = layers(config)
    assert len(targets) == sum(isinstance(m, nn.Linear | nn.Embedding) for m in random_network(config).modules()) + 1
    model = adapted(config, targets)
    with torch.no_grad():
        plain = random_network(config)(x, t, y, **more)
        for target in targets:
            model.get_submodule(target).set_scale("default", 0.0)
        torch.testing.assert_close(model(x, t, y, **more), plain, atol=1e-5, rtol=1e-5)
        for target in targets:
            layer = model.get_submodule(target)
            layer.set_scale("default", 1.0)
            assert relative_error(model(x, t, y, **more), plain) > 1e-4, target
            layer.set_scale("default", 0.0)
    for target in targets:
        model.get_submodule(target).set_scale("default", 1.0)
    model(x, t, y, **more).square().sum().backward()
    weights = trained(model)
    assert len(weights) == 2 * len(targets)
    assert [name for name, p in weights.items() if p.grad is None or not p.grad.abs().max() > 0] == []
    assert all(p.grad is None for name, p in model.named_parameters() if name not in weights)


def test_the_formula():
    """W x + (alpha / r) B A x, for one layer by hand; fused weights are W + (alpha / r) B A."""
    model = adapted(targets=["encoder.0.blocks.0.branches.mlp.linear_in"], lora_alpha=6)
    layer = model.encoder[0].blocks["0"].branches["mlp"].linear_in
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, layer.in_features)
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + 6 / 4 * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    fused = layer.base_layer.weight + 6 / 4 * B @ A
    model.fuse_lora()
    model.unload_lora()
    torch.testing.assert_close(model.encoder[0].blocks["0"].branches["mlp"].linear_in.weight, fused)


def test_adapters_are_set_weighted_disabled_fused_and_deleted():
    x, t, y = random_inputs(CONFIGS["whole"])
    model, plain = adapted(), random_network(CONFIGS["whole"])
    with torch.no_grad():
        base, first = plain(x, t, y), model(x, t, y)
        model.add_adapter(settings(["qkv"]), "second")
        second = model(x, t, y)
        assert model.active_adapters() == ["second"]
        model.set_adapter("default")
        torch.testing.assert_close(model(x, t, y), first)
        model.set_adapters(["default", "second"], [1.0, 0.0])
        torch.testing.assert_close(model(x, t, y), first)
        model.disable_adapters()
        assert torch.equal(model(x, t, y), base)
        model.enable_adapters()
        model.fuse_lora()
        torch.testing.assert_close(model(x, t, y), first, atol=1e-5, rtol=1e-4)
        model.unfuse_lora()
        model.delete_adapters("second")
        with pytest.raises(ValueError, match=r"adapter 'second' is unknown .*known: default"):
            model.delete_adapters("second")
        model.set_adapters("default", 0.0)
        torch.testing.assert_close(model(x, t, y), base, atol=1e-5, rtol=1e-4)
        model.delete_adapters("default")
    assert not model.has_adapters
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert relative_error(second, base) > 1e-3
    model.add_adapter(settings())                                               # and again


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_again_it_is_the_same(tmp_path, name):
    config = CONFIGS[name]
    x, t, y = random_inputs(config)
    model = adapted(config, [*BLOCK_PRODUCTS, "label_embedding", "patch_embedding.projection"], lora_alpha=9)
    model.save_lora_adapter(tmp_path)
    for source in (tmp_path, str(tmp_path / LORA_FILE)):
        again = random_network(config)
        again.load_lora_adapter(source, adapter_name="mine")
        with torch.no_grad():
            assert torch.equal(again(x, t, y), model(x, t, y))
    with pytest.raises(ValueError, match=r"adapter 'default' is unknown .*known: mine"):
        again.save_lora_adapter(tmp_path / "wrong")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        again.save_lora_adapter(tmp_path / "wrong", "mine", weight_name="lora.bin")
    assert not (tmp_path / "wrong").exists()
    again.unload_lora()
    with torch.no_grad():
        assert torch.equal(again(x, t, y), random_network(config)(x, t, y))


def test_an_adapter_is_swapped_in_place(tmp_path):
    config = CONFIGS["pruned"]
    x, t, y = random_inputs(config)
    for rank in (4, 8):
        model = adapted(config, r=rank)
        model.save_lora_adapter(tmp_path / str(rank))
    with torch.no_grad():
        expected, swapped = model(x, t, y), random_network(config)
        swapped.enable_lora_hotswap(target_rank=8)
        swapped.load_lora_adapter(tmp_path / "4", adapter_name="mine")
        first = swapped(x, t, y)
        swapped.load_lora_adapter(tmp_path / "8", adapter_name="mine", hotswap=True)
        torch.testing.assert_close(swapped(x, t, y), expected, atol=1e-5, rtol=1e-4)
        assert relative_error(first, expected) > 1e-3


@pytest.mark.parametrize("more", [dict(use_dora=True), dict(use_rslora=True), dict(lora_bias=True), dict(bias="all")])
def test_variants_of_peft_are_saved_and_fused_too(tmp_path, more):
    config = CONFIGS["pruned"]
    x, t, y = random_inputs(config)
    model, again = adapted(config, ["mlp.linear_in", "modulation"], **more), random_network(config)
    with torch.no_grad():
        expected = model(x, t, y)
        model.save_lora_adapter(tmp_path)
        again.load_lora_adapter(tmp_path)
        assert torch.equal(again(x, t, y), expected)
        again.fuse_lora()
        again.unload_lora()
        torch.testing.assert_close(again(x, t, y), expected, atol=1e-5, rtol=1e-4)


def test_mixed_labels_see_the_adapter_of_the_labels_and_plain_ones_keep_their_bits():
    config = CONFIGS["whole"]
    x, t, y = random_inputs(config)
    weights = torch.nn.functional.one_hot(y, config.num_classes + 1).float()
    plain = random_network(config)
    assert torch.equal(plain(x, t, weights), plain(x, t, y))
    model = adapted(config, ["label_embedding"])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, weights), model(x, t, y), atol=1e-5, rtol=1e-5)
        assert relative_error(model(x, t, weights), plain(x, t, weights)) > 1e-3


EVERYTHING = [
    *BLOCK_PRODUCTS, "condition", "modulation", "label_embedding", "timestep_embedding.linear_in", "head.linear",
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", [None, LaMambaCacheConfig(interval=3)])
def test_conditioning_made_ahead_equals_the_plain_path(monkeypatch, name, cache):
    model = adapted(CONFIGS[name].replace(in_channels=1), EVERYTHING)
    run = dict(num_steps=8, guidance=2.0, cache=cache)
    ahead = generate(model, [0, 1, 2], [5, 6, 7], **run)
    monkeypatch.setattr("lamamba.inference.conditioning.is_hooked", lambda network: True)
    plain = generate(model, [0, 1, 2], [5, 6, 7], **run)
    assert largest_difference(ahead, plain) <= 1
    model.unload_lora()
    assert largest_difference(generate(model, [0, 1, 2], [5, 6, 7], **run), plain) > 1


@pytest.mark.parametrize("cache", [None, LaMambaCacheConfig(interval=3)])
@pytest.mark.parametrize("unprepared", [False, True])
def test_adapters_switched_in_the_middle_of_a_run_count_at_once(monkeypatch, cache, unprepared):
    """Not the rows and features that were computed before."""
    if unprepared:
        monkeypatch.setattr("lamamba.inference.conditioning.is_hooked", lambda network: True)
    model = adapted(CONFIGS["whole"], EVERYTHING)
    plain = random_network(CONFIGS["whole"])
    times = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0]
    x, _, _ = random_inputs(CONFIGS["whole"])
    predict, expected = (GuidedModel(network, times, Guidance(2.0), cache=cache).predictor([0, 1], torch.device("cpu"))
                         for network in (model, plain))
    with torch.no_grad():
        for t in times[:3]:
            predict(x, torch.full((2,), t))
        model.disable_adapters()
        for t in times[3:]:                                                     # the first is full again
            output = predict(x, torch.full((2,), t))
            torch.testing.assert_close(output, expected(x, torch.full((2,), t)), atol=1e-5, rtol=1e-5)


def test_features_of_an_enabled_cache_are_forgotten_with_the_adapter():
    model = adapted()
    x, _, y = random_inputs(CONFIGS["whole"])
    model.enable_cache(LaMambaCacheConfig(interval=3))
    with torch.no_grad():
        for t in (900.0, 800.0, 700.0):
            with model.cache_context("cond"):
                model(x, t, y)
        model.disable_adapters()
        with model.cache_context("cond"):
            output = model(x, 600.0, y)
        assert torch.equal(output, random_network(CONFIGS["whole"])(x, 600.0, y))


def test_compiled_networks_honour_it_also_when_it_is_switched():
    config = CONFIGS["pruned"]
    x, t, y = random_inputs(config)
    model, compiled = adapted(config, EVERYTHING), adapted(config, EVERYTHING)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for network in (model, compiled):
        network(x, t, y).square().mean().backward()
    for p, q in zip(trained(model).values(), trained(compiled).values(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y), atol=1e-5, rtol=1e-4)
        compiled.disable_adapters()
        torch.testing.assert_close(compiled(x, t, y), random_network(config)(x, t, y), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="needs a processor with packed bfloat16 products")
def test_packed_networks_honour_it():
    config = CONFIGS["whole"]
    x, t, y = random_inputs(config)
    half = torch.nn.Module.to(adapted(config, EVERYTHING), torch.bfloat16)
    with torch.no_grad():
        expected = half(x.bfloat16(), t, y)
        pack_weights(half, 64)
        assert any(isinstance(module, PackedLinear) for module in half.modules())
        assert relative_error(half(x.bfloat16(), t, y), expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_reads_weights_that_stay_as_they_are(dtype, monkeypatch):
    if not can_pack(dtype):
        pytest.skip(f"no packed products in {dtype} on this processor")
    monkeypatch.setattr(packing, "FEWEST_WEIGHTS", 0)
    model = torch.nn.Module.to(adapted(use_dora=True), dtype)
    x, t, y = random_inputs(CONFIGS["whole"])
    with torch.no_grad():
        expected = model(x.to(dtype), t, y)
        pack_weights(model, 64)
        assert any(isinstance(module, PackedLinear) for module in model.modules())
        assert relative_error(model(x.to(dtype), t, y).float(), expected.float()) < 0.02


def test_the_adapters_weights_are_not_quantised():
    model = adapted()
    named = [name for name, module in model.named_modules() if is_quantized(module, name)]
    assert named
    assert not any("lora_" in name for name in named)
    assert sum(name.endswith(".base_layer") for name in named) == len(trained(model)) // 2


def test_a_network_with_adapters_is_not_saved_or_pruned_as_a_plain_one(tmp_path):
    model = adapted()
    for refused in (lambda: model.save_pretrained(tmp_path), lambda: LaMambaUnits(model)):
        with pytest.raises(ValueError, match=r"networks without adapters \(default\): call fuse_lora"):
            refused()
    assert not any(tmp_path.iterdir())
    x, t, y = random_inputs(CONFIGS["whole"])
    with torch.no_grad():
        expected = model(x, t, y)
        model.fuse_lora()
        model.unload_lora()
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(LaMambaUNet.from_pretrained(tmp_path)(x, t, y), expected, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path):
    adapted(small_config(width=32)).save_lora_adapter(tmp_path / "wider")
    adapted(small_config(depths=(3, 1, 1, 1))).save_lora_adapter(tmp_path / "deeper")
    random_network(CONFIGS["whole"]).save_pretrained(tmp_path / "network")
    model = random_network(CONFIGS["whole"])
    names = list(model.state_dict())
    for source, fault in (
        (tmp_path / "wider", r"of another network: .*lora_A.weight has shape \(4, 128\), and .* needs \(4, 64\)"),
        (tmp_path / "deeper", "is a LoRA of another network: this one has no layer"),
        (tmp_path / "network", f"holds no LoRA: there is no {LORA_FILE}"),
        (next((tmp_path / "network").glob("*.safetensors")), "holds no LoRA in peft's form"),
        ({}, "holds no LoRA in peft's form"),
    ):
        with pytest.raises((ValueError, OSError), match=fault):
            model.load_lora_adapter(source)
        assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="branches.scan.conv is a depthwise convolution fused with its SiLU"):
        model.add_adapter(settings(["conv"]))
    with pytest.raises(ValueError, match=r"target_parameters=\['W_x'\]: peft saves .* but cannot load them"):
        model.add_adapter(settings(["qkv"], target_parameters=["W_x"]))
    with pytest.raises(ValueError, match="takes peft's LoraConfig, not dict"):
        model.add_adapter({"r": 4})
    with pytest.raises(ValueError, match="ModulatedNorm"):
        model.add_adapter(settings(["linear_in", "norms.mlp"]))
    with pytest.raises(ValueError, match="layer for a LoRA 'attention.qvk' is unknown; did you mean"):
        find_targets(dict(model.named_modules()), ["attention.qvk"])
    assert list(model.state_dict()) == names


def without(part):
    return lambda tensors, settings: tensors.pop(next(name for name in tensors if part in name))


def with_values(change):
    def damage(tensors, settings):
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = change(tensors[name]).contiguous()
    return damage


@pytest.mark.parametrize(("damage", "said"), [
    (without("lora_A"), "is damaged: it has .*lora_B.weight without .*lora_A.weight"),
    (without("lora_B"), "is damaged: it has .*lora_A.weight without .*lora_B.weight"),
    (with_values(lambda a: a[:2]), "is damaged: .*lora_A.weight of shape .* have no rank in common"),
    (with_values(lambda a: a * torch.nan), "lora_A.weight holds NaN or infinities"),
    (with_values(lambda a: a.int()), "lora_A.weight has type torch.int32, not one of torch.float32"),
    (lambda t, s: s.update(r=8), "is damaged: .*lora_A.weight has rank 4, and its settings say r=8"),
    (lambda t, s: s.update(use_dora=True), "there are no tensors called LAYER.lora_magnitude_vector"),
    *((lambda t, s, more=more: s.update(more), said) for more, said in (
        (dict(r=0), "r=0 must be a whole number of at least 1"), (dict(r="4"), "r='4' must be a whole number"),
        (dict(lora_alpha=None), "lora_alpha=None must be a finite number"),
        (dict(lora_alpha=10**400), "must be a finite number"),
        (dict(lora_alpha=float("nan")), "lora_alpha=nan must be a finite number"),
        (dict(peft_type="IA3"), "peft_type='IA3' must be LORA"),
        (dict(zzz=1), "cannot be loaded by peft: .*unexpected keyword argument 'zzz'"),
        (dict(rank_pattern=[1]), "cannot be loaded by peft"), (dict(bias=3), "cannot be loaded by peft"),
        (dict(target_modules="(["), "cannot be loaded by peft"), (dict(lora_dropout=5.0), "cannot be loaded by peft"),
        (dict(modules_to_save=["head"]), "modules_to_save has 'head', and there are no tensors of it"),
    )),
])
def test_a_damaged_lora_is_refused_in_one_line_and_nothing_is_changed(tmp_path, capfd, damage, said):
    adapted(CONFIGS["pruned"]).save_lora_adapter(tmp_path)
    tensors, values = read_tensors(tmp_path / LORA_FILE), read_settings(tmp_path / LORA_FILE)
    damage(tensors, values)
    save_file(tensors, tmp_path / LORA_FILE, metadata={LORA_SETTINGS: json.dumps(values)})
    model = random_network(CONFIGS["pruned"])
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=said) as raised:
        model.load_lora_adapter(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert capfd.readouterr().err == ""
    assert list(model.state_dict()) == names
    model.add_adapter(settings())                                               # and it may have another one


def test_without_peft_all_else_works_and_the_error_names_the_extra():
    code = """
import sys
sys.modules["peft"] = None
import torch, lamamba
from tests.networks import random_network, small_config, random_inputs
model = random_network(small_config())
model(*random_inputs(small_config()))
for call in (lambda: model.add_adapter(None), lambda: model.load_lora_adapter("x"), model.unload_lora):
    try:
        call()
    except RuntimeError as error:
        assert str(error) == "LoRA needs peft: pip install 'lamamba-diff[lora]'", error
    else:
        sys.exit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peft_is_imported_only_where_it_is_needed():
    code = (
        "import sys, lamamba, lamamba.models.unet, lamamba.sampling.generate, lamamba.training.loop; "
        "sys.exit(any(name in sys.modules for name in ('peft', 'diffusers.loaders.lora_base')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("names", "weights", "said"), [
    (["defalut"], None, "did you mean 'default'"), ("default", "x", "must be finite numbers"),
    (["default"], [float("nan")], "must be finite numbers"),
])
def test_adapters_that_are_not_there_and_weights_that_are_none(names, weights, said):
    model = adapted(CONFIGS["pruned"])
    with pytest.raises(ValueError, match=said):
        model.set_adapters(names, weights)
    model.set_adapters("default", 0.5)
    assert model.active_adapters() == ["default"]


@pytest.mark.parametrize("place", ["./nowhere/x", "/nowhere/x", "a/b/c"])
def test_a_lora_that_does_not_exist_is_not_sought_at_the_hub(place):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        adapted(CONFIGS["pruned"]).load_lora_adapter(place)
