"""The layers as GPU operators with gradients, by Triton kernels.

Each layer is an operator `gpu_<layer>` and another for its gradients: opaque to autograd, torch.compile and the FLOP
counter. The kernels' modules are imported at their first call, because Triton is optional.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lamamba.ops.dispatch import formula_gradients
from lamamba.ops.layers import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_WINDOW_TOKENS = 64
"""Tokens of the largest window whose scores fit into registers."""

_MODULES = {
    "modulated_norm": "triton_norms", "gated_norm": "triton_norms", "gated_sum": "triton_norms",
    "local_mixing": "triton_mixing", "window_attention": "triton_windows",
}


@cache
def unsupported_reason(device_type: str) -> str | None:
    """Return why the kernels cannot run on such a device here; None when they can."""
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        return f"they need a CUDA device (x is on {device_type}), or TRITON_INTERPRET=1"
    return None


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"lamamba.ops.layers.{_MODULES[name]}")


_VECTORS = "Tensor? weight, Tensor? bias, Tensor shift, Tensor scale, float eps"
_WINDOWS = "Tensor qkv, Tensor bias, Tensor? mask, int num_heads, int[] window, int[] shift"
_SCHEMAS = {
    "modulated_norm": (f"Tensor x, {_VECTORS}", 5),
    "gated_norm": ("Tensor x, Tensor z, Tensor weight, Tensor bias, float eps", 4),
    "local_mixing": ("Tensor x, Tensor weight", 2),
    "window_attention": (_WINDOWS, 2),
}
"""Arguments of each layer, and how many gradients its backward operator returns, in the order of the arguments."""


def _register(name: str, arguments: str, num_gradients: int) -> None:
    forward, backward = f"lamamba::gpu_{name}", f"lamamba::gpu_{name}_backward"
    outputs = ", ".join(["Tensor"] * num_gradients)
    torch.library.define(forward, f"({arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(backward, f"(Tensor grad_y, {arguments}) -> ({outputs})", tags=torch.Tag.pt2_compliant_tag)

    def run(*inputs):
        return getattr(_kernels(name), name)(*inputs)

    def run_backward(grad_y, *inputs):
        return getattr(_kernels(name), f"{name}_backward")(grad_y, *inputs)

    for device_type in ("cpu", "cuda"):                                         # "cpu": under the interpreter
        torch.library.impl(forward, device_type, run)
        torch.library.impl(backward, device_type, run_backward)

    def fake(x, *rest):
        return x.new_empty((*x.shape[:3], x.shape[3] // 3) if name == "window_attention" else x.shape)

    def fake_backward(grad_y, *inputs):
        return tuple(grad_y.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:num_gradients])

    torch.library.register_fake(forward, fake)
    torch.library.register_fake(backward, fake_backward)

    def save(ctx, inputs, output) -> None:
        ctx.num_tensors = sum(x is None or isinstance(x, Tensor) for x in inputs)
        ctx.rest = inputs[ctx.num_tensors :]
        ctx.save_for_backward(*inputs[: ctx.num_tensors])

    def differentiate(ctx, grad_y):
        inputs = (*ctx.saved_tensors, *ctx.rest)
        if torch.is_grad_enabled():                                             # gradients of gradients follow
            return tuple(formula_gradients(getattr(reference, name), inputs, grad_y, ctx.needs_input_grad))
        grads = getattr(torch.ops.lamamba, f"gpu_{name}_backward")(grad_y, *inputs)
        grads = [None if x is None else grad for grad, x in zip(grads, inputs, strict=False)]
        return *grads, *[None] * (len(inputs) - num_gradients)

    torch.library.register_autograd(forward, differentiate, setup_context=save)


for _name, (_arguments, _num_gradients) in _SCHEMAS.items():
    _register(_name, _arguments, _num_gradients)


torch.library.define("lamamba::gpu_gated_sum", "(Tensor x, Tensor y, Tensor gate) -> Tensor")
torch.library.define("lamamba::gpu_gated_sum_backward", "(Tensor grad, Tensor y, Tensor gate) -> (Tensor, Tensor)")


@torch.library.impl("lamamba::gpu_gated_sum", ("cpu", "cuda"))
def _gated_sum(x, y, gate):
    return reference.gated_sum(x, y, gate)                                      # one pass in PyTorch


@torch.library.impl("lamamba::gpu_gated_sum_backward", ("cpu", "cuda"))
def _gated_sum_backward(grad, y, gate):
    return _kernels("gated_sum").gated_sum_backward(grad, y, gate)


@torch.library.register_fake("lamamba::gpu_gated_sum")
def _(x, y, gate):
    return x.new_empty(x.shape)


@torch.library.register_fake("lamamba::gpu_gated_sum_backward")
def _(grad, y, gate):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _save_gated_sum(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])                                          # x has no part in the gradients


def _differentiate_gated_sum(ctx, grad):
    if torch.is_grad_enabled():                                                 # gradients of gradients follow
        y, gate = ctx.saved_tensors
        return grad, (grad * gate[:, None, None]).to(y.dtype), (grad * y).sum((1, 2)).to(gate.dtype)
    return grad, *torch.ops.lamamba.gpu_gated_sum_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd(
    "lamamba::gpu_gated_sum", _differentiate_gated_sum, setup_context=_save_gated_sum,
)
