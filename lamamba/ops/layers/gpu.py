"""The layers as GPU operators with gradients, by Triton kernels.

Each layer is an operator `gpu_<layer>` and another for its gradients: opaque to autograd, torch.compile and the FLOP
counter. The kernels' modules are imported at their first call, because Triton is optional.
"""

from __future__ import annotations

import importlib
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from lamamba.ops.dispatch import formula_gradients
from lamamba.ops.layers import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_WINDOW_TOKENS = 64
"""Tokens of the largest window whose scores fit into registers."""
MOST_GELU_DEPTH = 512
"""Channels up to which GELU inside its product is worth a slower product (docs/gpu-layers.md)."""

_MODULES = {
    "modulated_norm": "triton_norms", "gated_norm": "triton_norms", "gated_sum": "triton_norms",
    "gated_sum_norm": "triton_norms", "scan_gated_norm": "triton_norms", "local_mixing": "triton_mixing",
    "window_attention": "triton_windows", "linear_gelu": "triton_products",
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


def has_tiles(device: torch.device) -> bool:
    """Whether the shared memory holds the tiles of the matrix products: since Ampere, and under the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"lamamba.ops.layers.{_MODULES[name]}")


SCHEMAS = {
    "modulated_norm": "Tensor x, Tensor? weight, Tensor? bias, Tensor shift, Tensor scale, float eps",
    "gated_norm": "Tensor x, Tensor z, Tensor weight, Tensor bias, float eps",
    "gated_sum": "Tensor x, Tensor y, Tensor gate",
    "local_mixing": "Tensor x, Tensor weight",
    "window_attention": "Tensor qkv, Tensor bias, Tensor? mask, int num_heads, int[] window, int[] shift",
}
"""Arguments of each layer."""
INFERENCE_SCHEMAS = {
    "gated_sum_norm": (
        "Tensor x, Tensor y, Tensor gate, Tensor? weight, Tensor? bias, Tensor shift, Tensor scale, float eps",
        "(Tensor, Tensor)"),
    "scan_gated_norm": (
        "Tensor x, Tensor z, Tensor dt, Tensor B, Tensor C, Tensor W_dt, Tensor b_dt, Tensor A, Tensor D, "
        "Tensor paths, Tensor weight, Tensor bias, float eps", "Tensor"),
    "linear_gelu": ("Tensor x, Tensor weight, Tensor bias", "Tensor"),
}
"""Arguments and results of layers that run without gradients alone."""
_NUM_GRADIENTS = {"modulated_norm": 5, "gated_norm": 4, "gated_sum": 2, "local_mixing": 2, "window_attention": 2}
"""Of each backward operator, in the order of the arguments."""


def fake(name: str, x: Tensor, *rest) -> Tensor:
    """A layer's output without values, from its arguments."""
    if name == "gated_sum":                                                     # it is PyTorch's: strides follow x
        return reference.gated_sum(x, *rest)
    return x.new_empty((*x.shape[:3], x.shape[3] // 3) if name == "window_attention" else x.shape)


def _register(name: str, arguments: str, num_gradients: int) -> None:
    forward, backward = f"lamamba::gpu_{name}", f"lamamba::gpu_{name}_backward"
    skipped = 1 if name == "gated_sum" else 0                                   # x: its gradient is the output's
    needed, outputs = ", ".join(arguments.split(", ")[skipped:]), ", ".join(["Tensor"] * num_gradients)
    torch.library.define(forward, f"({arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(backward, f"(Tensor grad_y, {needed}) -> ({outputs})", tags=torch.Tag.pt2_compliant_tag)

    def run(*inputs):
        return getattr(_kernels(name), name, getattr(reference, name))(*inputs)         # gated_sum: one pass in PyTorch

    def run_backward(grad_y, *inputs):
        return getattr(_kernels(name), f"{name}_backward")(grad_y, *inputs)

    for device_type in ("cpu", "cuda"):                                         # "cpu": under the interpreter
        torch.library.impl(forward, device_type, run)
        torch.library.impl(backward, device_type, run_backward)

    def fake_backward(grad_y, *inputs):
        return tuple(grad_y.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:num_gradients])

    torch.library.register_fake(forward, partial(fake, name))
    torch.library.register_fake(backward, fake_backward)

    def save(ctx, inputs, output) -> None:
        inputs = inputs[skipped:]
        ctx.num_tensors = sum(x is None or isinstance(x, Tensor) for x in inputs)
        ctx.rest = inputs[ctx.num_tensors :]
        ctx.save_for_backward(*inputs[: ctx.num_tensors])

    def differentiate(ctx, grad_y):
        inputs = (*ctx.saved_tensors, *ctx.rest)
        if torch.is_grad_enabled():                                             # gradients of gradients follow
            formula = partial(getattr(reference, name), *[torch.zeros_like(grad_y)] * skipped)
            return *[grad_y] * skipped, *formula_gradients(formula, inputs, grad_y, ctx.needs_input_grad[skipped:])
        grads = getattr(torch.ops.lamamba, f"gpu_{name}_backward")(grad_y, *inputs)
        grads = [None if x is None else grad for grad, x in zip(grads, inputs, strict=False)]
        return *[grad_y] * skipped, *grads, *[None] * (len(inputs) - num_gradients)

    torch.library.register_autograd(forward, differentiate, setup_context=save)


def fake_inference(name: str, x: Tensor, *rest):
    """The outputs without values of a layer that has no gradients."""
    if name == "linear_gelu":
        return x.new_empty((*x.shape[:-1], rest[0].shape[0]))
    if name == "scan_gated_norm":
        return x.new_empty(x.shape)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _register_inference(name: str, arguments: str, outputs: str) -> None:
    operator = f"lamamba::gpu_{name}"
    torch.library.define(operator, f"({arguments}) -> {outputs}", tags=torch.Tag.pt2_compliant_tag)
    for device_type in ("cpu", "cuda"):
        torch.library.impl(operator, device_type, lambda *inputs: getattr(_kernels(name), name)(*inputs))
    torch.library.register_fake(operator, partial(fake_inference, name))


for _name, _arguments in SCHEMAS.items():
    _register(_name, _arguments, _NUM_GRADIENTS[_name])
for _name, (_arguments, _outputs) in INFERENCE_SCHEMAS.items():
    _register_inference(_name, _arguments, _outputs)
