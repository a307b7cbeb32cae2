"""Packed weights: the same network, for running only."""

from __future__ import annotations

import pytest
import torch

from lamamba.inference.packing import PackedLinear, can_pack, pack_weights
from lamamba.sampling import generate
from tests.networks import random_inputs, random_network, relative_error, small_config

needs_packing = pytest.mark.skipif(not can_pack(), reason="no packed bfloat16 products on this processor")


@needs_packing
def test_a_packed_network_gives_the_same_answers_and_samples():
    model = random_network(small_config(in_channels=1, objective="flow", width=32)).bfloat16()
    x, t, labels = random_inputs(model.architecture, batch=3)
    with torch.no_grad():
        plain = model(x.bfloat16(), t, labels)
        images = generate(model, [0, 1, 2], [0, 1, 2], num_steps=3, guidance=2.0)
        pack_weights(model, 3 * 64)
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
        assert relative_error(model(x.bfloat16(), t, labels).float(), plain.float()) <= 2e-2
    packed = generate(model, [0, 1, 2], [0, 1, 2], num_steps=3, guidance=2.0)
    assert abs(packed.astype(int) - images).mean() < 3


@needs_packing
def test_what_packed_weights_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"takes bfloat16 weights on the CPU, not torch.float32"):
        pack_weights(random_network(small_config()), 64)
    model = random_network(small_config()).bfloat16()
    pack_weights(model, 64)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(RuntimeError, match="save the network before"):
        model.save_pretrained(tmp_path)
