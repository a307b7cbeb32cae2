"""Parts of a block: where GELU may be computed inside the product before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lamamba.models.blocks import MLP, is_plain


class Adapted(nn.Linear):
    """As an adapter or another number format replaces a layer."""


def hooked(register: str) -> nn.Linear:
    linear = nn.Linear(4, 8)
    getattr(linear, register)(lambda *_: None)
    return linear


def offloaded() -> nn.Linear:
    """As accelerate and diffusers bring weights."""
    linear = nn.Linear(4, 8)
    linear.forward = linear.forward
    return linear


def test_only_a_layer_that_is_a_product_and_nothing_else_is_plain():
    assert is_plain(nn.Linear(4, 8))
    others = (nn.Linear(4, 8, bias=False), Adapted(4, 8), hooked("register_forward_hook"), offloaded(),
              hooked("register_forward_pre_hook"), weight_norm(nn.Linear(4, 8)), nn.Identity())
    assert not any(is_plain(linear) for linear in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_in_the_product_gives_the_same_bits_on_cpus(dtype):
    mlp, x = MLP(16, 64).to(dtype), torch.randn(2, 3, 5, 16).to(dtype)
    with torch.no_grad():
        assert torch.equal(mlp(x, None), mlp.linear_out(nn.functional.gelu(mlp.linear_in(x))))
        plain = mlp(x, None)
    assert torch.equal(mlp(x, None), plain)
