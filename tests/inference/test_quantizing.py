"""Weights of eight bits change the output little; what is sensitive stays, and what was saved is loaded again."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import lamamba
from lamamba import LaMambaUNet
from lamamba.inference import quantizing
from lamamba.pretrained import shipped_model
from lamamba.runs.model import open_network
from tests.networks import random_inputs

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
KINDS = ("int8", "int8-dynamic")
BOUNDS = {"int8": 0.01, "int8-dynamic": 0.04}
"""Of the output's error, root mean square over root mean square."""


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


@needs_torchao
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
        quantizing.quantize(model, kind)
        torch.testing.assert_close(model(x, t, labels), found, rtol=1e-4, atol=1e-4)
        loaded.save_pretrained(tmp_path)
        again = LaMambaUNet.from_pretrained(tmp_path, torch_dtype=torch.float32)
        assert torch.equal(again(x, t, labels), found)
    with pytest.raises(ValueError, match="its weights are quantised, which LaMambaUNet.from_pretrained reads"):
        lamamba.open_model(tmp_path)


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_say_so_and_repeat_themselves(kind, tmp_path):
    options = dict(classes=[3], num=2, steps=3, device="cpu", out=tmp_path / "a.png")
    first = lamamba.sample(lamamba.SampleOptions(quantize=kind, cache=2, **options), progress=None)
    assert f"guidance 1.75, {kind}, cache 2" in str(first)
    again = lamamba.sample(
        lamamba.SampleOptions(like=tmp_path / "a.png", out=tmp_path / "b.png", device="cpu"), progress=None)
    assert again.metadata.settings.quantized == kind
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
