"""Weights of eight bits change the output little; what is sensitive stays, and what was saved is loaded again."""

from __future__ import annotations

import contextlib
import importlib.util

import diffusers
import pytest
import torch

import lamamba
from lamamba import LaMambaUNet
from lamamba.inference import quantizing
from lamamba.pretrained import shipped_model
from lamamba.runs.model import move, open_network
from tests.networks import random_inputs

KINDS = ("int8", "int8-dynamic")
BOUNDS = {"int8": 0.01, "int8-dynamic": 0.04, "fp8": 0.05}
"""Of the output's error, root mean square over root mean square."""
CAN_SAVE = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 39)


def error(result, expected):
    return float((result - expected).norm() / expected.norm())


def test_without_torchao_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for refused in (
        lambda: quantizing.quantization_config("int8"), lambda: quantizing.quantize(torch.nn.Linear(2, 2), "int8"),
        lambda: lamamba.sample(lamamba.SampleOptions(quantize="int8", out=tmp_path / "a.png"), progress=None),
    ):
        with pytest.raises(RuntimeError, match=r"need torchao: pip install 'lamamba-diff\[quantize\]'"):
            refused()
    assert not (tmp_path / "a.png").exists()


def test_what_is_sensitive_keeps_its_precision():
    model = open_network(None)[0]
    chosen = {name for name, module in model.named_modules() if quantizing.is_quantized(module, name)}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {"merges.0.linear", "encoder.1.blocks.0.branches.scan.in_proj"} <= chosen
    kept = {name.rpartition(".")[2] for name in linear - chosen if not name.startswith(("head", "timestep"))}
    assert kept == {"condition", "modulation"}
    assert not any(name.startswith(("head", "timestep_embedding")) for name in chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_changes_little_and_loading_again_changes_nothing(kind, tmp_path):
    model = open_network(None)[0]
    x, t, labels = random_inputs(model.architecture, batch=8)
    with torch.no_grad():
        expected = model(x, t, labels)
        loaded = LaMambaUNet.from_pretrained(
            shipped_model(), quantization_config=quantizing.quantization_config(kind), torch_dtype=torch.float32)
        found = loaded(x, t, labels)
        assert 0 < error(found, expected) <= BOUNDS[kind]
        quantizing.quantize(model, kind)                                        # int8-dynamic: kernels of our own
        assert error(model(x, t, labels), expected) <= 1.2 * error(found, expected)
        if not CAN_SAVE:
            return
        loaded.save_pretrained(tmp_path)
        again = LaMambaUNet.from_pretrained(tmp_path, torch_dtype=torch.float32)
        assert torch.equal(again(x, t, labels), found)
    with pytest.raises(ValueError, match="its weights are quantised, which LaMambaUNet.from_pretrained reads"):
        lamamba.open_model(tmp_path)


def test_what_diffusers_cannot_save_is_refused(monkeypatch, tmp_path):
    """As diffusers 0.37 and 0.38, which lack this method."""
    from diffusers.quantizers.torchao import TorchAoHfQuantizer

    monkeypatch.delattr(TorchAoHfQuantizer, "get_state_dict_and_metadata", raising=CAN_SAVE)
    monkeypatch.delattr(diffusers.quantizers.base.DiffusersQuantizer, "get_state_dict_and_metadata", raising=CAN_SAVE)
    loaded = LaMambaUNet.from_pretrained(shipped_model(), quantization_config=quantizing.quantization_config("int8"))
    with pytest.raises(RuntimeError, match="cannot save quantised weights, 0.39 and newer can"):
        loaded.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="one scale for all tokens is all that older CPU products take")
def test_fp8_changes_the_output_little(monkeypatch):
    """With the CPU's product of float8, which torchao uses on GPUs alone."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    model = move(open_network(None)[0], torch.device("cpu"), torch.bfloat16)
    x, t, labels = random_inputs(model.architecture, batch=8)
    with torch.no_grad():
        expected = model(x.to(torch.bfloat16), t, labels)
        quantizing.quantize(model, "fp8")
        assert 0 < error(model(x.to(torch.bfloat16), t, labels), expected) <= BOUNDS["fp8"]


@pytest.mark.parametrize(("capability", "dtype", "said"), [
    (None, torch.bfloat16, "not cpu: take int8-dynamic"),
    ((8, 0), torch.bfloat16, r"not NVIDIA A100 of 8\.0: take int8-dynamic"),
    ((9, 0), torch.float32, "the network is in float32: give dtype bfloat16"),
    ((8, 9), torch.bfloat16, None),
])
def test_fp8_is_for_gpus_that_multiply_it_and_bfloat16(capability, dtype, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    device = torch.device("cuda" if capability else "cpu")
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        quantizing.check_quantization("fp8", device, dtype)


def test_fp8_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="fp8 needs a GPU of compute capability 8.9 or more"):
        lamamba.sample(lamamba.SampleOptions(quantize="fp8", device="cpu", out=tmp_path / "a.png"), progress=None)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bias"), [(1, 4, 3, True), (37, 33, 20, False), (64, 128, 96, True)])
def test_int8_products_are_those_of_the_rounded_numbers(dtype, rows, inputs, outputs, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=bias).to(dtype)
    x = torch.randn(rows, inputs).to(dtype)
    x[0] = 0
    with torch.no_grad():
        found = quantizing.Int8Linear(linear)(x.view(1, rows, inputs))
        x, weight = x.double(), linear.weight.double()
        row, column = (part.abs().amax(1, keepdim=True) / 127 for part in (x, weight))
        q, w = (x / row.clamp(min=1e-30)).round(), (weight / column).round()
        expected = (q @ w.T) * row * column.T + (0 if linear.bias is None else linear.bias.double())
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 1e-2}[dtype]              # ties round either way
    assert (found.shape, found.dtype) == ((1, rows, outputs), dtype)
    assert error(found[0].double(), expected) < tolerance


def test_int8_products_of_numbers_that_are_not_finite_are_not_finite():
    layer = quantizing.Int8Linear(torch.nn.Linear(40, 8))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(3, 40)
        x[1, 17] = bad
        finite = layer(x).isfinite().all(1)
        assert finite.tolist() == [True, False, True]


def test_int8_products_need_no_torchao_and_cannot_be_saved(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = open_network(None)[0]
    quantizing.quantize(model, "int8-dynamic")
    with pytest.raises(RuntimeError, match="cannot be saved"):
        model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_say_so_and_repeat_themselves(kind, tmp_path):
    options = dict(classes=[3], num=2, steps=3, device="cpu", out=tmp_path / "a.png")
    first = lamamba.sample(lamamba.SampleOptions(quantize=kind, cache=2, **options), progress=None)
    assert f"guidance 1.75, {kind}, cache 2" in str(first)
    again = lamamba.sample(
        lamamba.SampleOptions(like=tmp_path / "a.png", out=tmp_path / "b.png", device="cpu"), progress=None)
    assert again.metadata.settings.quantized == kind
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
