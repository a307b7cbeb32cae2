"""Packed weights: the same network, for running only."""

from __future__ import annotations

import pytest
import torch

from lamamba.inference import packing
from lamamba.inference.packing import (
    PackedConv2d,
    PackedLinear,
    can_pack,
    can_pack_convolutions,
    pack_convolutions,
    pack_weights,
)
from lamamba.sampling import generate
from tests.networks import random_inputs, random_network, relative_error, small_config

DTYPES = pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
needs_packing = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no packed bfloat16 products on this processor")


@DTYPES
def test_a_packed_network_gives_the_same_answers_and_samples(dtype, most, monkeypatch):
    if not can_pack(dtype):
        pytest.skip(f"no packed products in {dtype} on this processor")
    monkeypatch.setattr(packing, "FEWEST_WEIGHTS", 0)
    model = random_network(small_config(in_channels=1, objective="flow", width=32)).to(dtype)
    x, t, labels = random_inputs(model.architecture, batch=3)
    with torch.no_grad():
        plain = model(x.to(dtype), t, labels)
        images = generate(model, [0, 1, 2], [0, 1, 2], num_steps=3, guidance=2.0)
        pack_weights(model, 3 * 64)
        assert not any(isinstance(module, (torch.nn.Linear, torch.nn.GELU)) for module in model.modules())
        assert relative_error(model(x.to(dtype), t, labels).float(), plain.float()) <= most
    packed = generate(model, [0, 1, 2], [0, 1, 2], num_steps=3, guidance=2.0)
    assert abs(packed.astype(int) - images).mean() < (3 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@DTYPES
def test_gelu_is_part_of_the_product_before_it(dtype, most, approximate):
    if not can_pack(dtype):
        pytest.skip(f"no packed products in {dtype} on this processor")
    torch.manual_seed(0)
    layers = torch.nn.Linear(400, 400), torch.nn.GELU(approximate), torch.nn.Linear(400, 8)
    model = torch.nn.Sequential(*layers).to(dtype)
    x = torch.randn(64, 400, dtype=dtype)
    with torch.no_grad():
        plain = model(x).float()
        pack_weights(model, 64)
        assert relative_error(model(x).float(), plain) <= most
    small = dtype == torch.float32
    assert [type(layer) for layer in model] == [
        PackedLinear, torch.nn.Identity, torch.nn.Linear if small else PackedLinear]


@needs_packing
def test_what_packed_weights_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"takes float32 or bfloat16 weights on the CPU, not torch.float16"):
        pack_weights(random_network(small_config()).half(), 64)
    model = random_network(small_config()).bfloat16()
    pack_weights(model, 64)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(RuntimeError, match="save the network before"):
        model.save_pretrained(tmp_path)


@DTYPES
def test_packed_convolutions_give_the_same_answers_also_for_other_sizes(dtype, most, tmp_path):
    torch.manual_seed(0)
    settings = (dict(padding=1), dict(stride=2, padding=1, bias=False), dict(padding=2, dilation=2, groups=4))
    model = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, **each) for each in settings)).to(dtype)
    inputs = [torch.randn(2, 16, side, side).to(dtype, memory_format=torch.channels_last) for side in (16, 10)]
    with torch.no_grad():
        plain = [model(x).float() for x in inputs]
        pack_convolutions(model)
        assert all(isinstance(module, PackedConv2d) == can_pack_convolutions(dtype) for module in model)
        for x, expected in zip(inputs, plain, strict=True):
            assert relative_error(model(x).float(), expected) <= most
    if can_pack_convolutions(dtype):
        with pytest.raises(RuntimeError, match="save the network before"):
            model.state_dict()


def test_convolutions_that_do_more_than_convolve_stay_as_they_are():
    class Larger(torch.nn.Conv2d):
        pass

    model = torch.nn.Sequential(Larger(4, 4, 3), torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    pack_convolutions(model)
    assert not any(isinstance(module, PackedConv2d) for module in model)
