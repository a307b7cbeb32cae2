"""What a network does between its matrix products: norms, conditions, local mixing, windows.

Each is one formula of several PyTorch operations (`reference`). On CPUs, where nobody asks for gradients, compiled
kernels (`cpu`) make it one pass over the tokens; with gradients and on other devices the formula itself runs, for
torch.compile to fuse. The back end in force (lamamba.ops.dispatch) may be "cpu"; any other name means the formula.

    sizes: b images, h and w the grid, l = h w tokens, c channels
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lamamba.config import Grid
from lamamba.ops import native
from lamamba.ops.dispatch import backend_in_force
from lamamba.ops.layers import cpu, reference

FEW_ROWS = {torch.float32: 8, torch.bfloat16: 2}
MANY_WEIGHTS = 2**18


def modulated_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-5,
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift: x (b, h, w, c), weight and bias (c,), shift and scale (b, c)."""
    if _runs_compiled(x, weight, bias, shift, scale):
        return torch.ops.lamamba.modulated_norm(x, weight, bias, shift, scale, eps)
    return reference.modulated_norm(x, weight, bias, shift, scale, eps)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias: x (b, i), weight (o, i), bias (o,).

    Compiled for so few rows that reading the weights is the work, where it beats PyTorch's product (measured).
    """
    few = not torch.compiler.is_compiling() and x.shape[0] <= FEW_ROWS.get(x.dtype, 0)
    if few and weight.numel() >= MANY_WEIGHTS and _runs_compiled(x, weight, bias):
        return torch.ops.lamamba.few_rows_linear(x, weight, bias)
    return reference.few_rows_linear(x, weight, bias)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x) SiLU(z): x and z (b, h, w, c), weight and bias (c,)."""
    if _runs_compiled(x, z, weight, bias):
        return torch.ops.lamamba.gated_norm(x, z, weight, bias, eps)
    return reference.gated_norm(x, z, weight, bias, eps)


def local_mixing(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a 3 x 3 convolution of every channel by itself: x (b, h, w, c), weight (c, 1, 3, 3), zeros around."""
    if _runs_compiled(x, weight):
        return torch.ops.lamamba.local_mixing(x, weight)
    return reference.local_mixing(x, weight)


def window_attention(
    qkv: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, window: Grid, shift: Grid,
) -> Tensor:
    """Attention among the tokens of each window of the grid, rolled by -shift: (b, h, w, 3 c) -> (b, h, w, c).

    Where the window does not divide the grid, tokens of zeros are added at the bottom and right.

    Args:
        qkv: queries, keys and values, each by heads.
        bias: (heads, tokens, tokens) added to the scores of every pair of a window's tokens.
        mask: (windows, tokens, tokens) bool, the pairs that may see each other; None for all.
        num_heads, window, shift: heads, and the sides of a window and of the roll in tokens.
    """
    if _runs_compiled(qkv) and not _wants_gradients(bias):
        return torch.ops.lamamba.window_attention(qkv, bias, mask, num_heads, window, shift)
    return reference.window_attention(qkv, bias, mask, num_heads, window, shift)


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _runs_compiled(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled kernels take these tensors: on the CPU, of one type, and nobody asks for gradients."""
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES or _wants_gradients(x, *others):
        return False
    if any(other is not None and (other.dtype != x.dtype or other.device != x.device) for other in others):
        return False
    return x.numel() > 0 and backend_in_force() in ("auto", "cpu") and _have_kernels()


@torch.compiler.assume_constant_result
def _have_kernels() -> bool:
    return native.load() is not None


# Not torch.library.custom_op, which checks more: twice the cost of a call, and a network makes a hundred of them.
_SCHEMAS = {
    "modulated_norm": "(Tensor x, Tensor? weight, Tensor? bias, Tensor shift, Tensor scale, float eps) -> Tensor",
    "gated_norm": "(Tensor x, Tensor z, Tensor weight, Tensor bias, float eps) -> Tensor",
    "few_rows_linear": "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "local_mixing": "(Tensor x, Tensor weight) -> Tensor",
    "window_attention": "(Tensor qkv, Tensor bias, Tensor? mask, int num_heads, int[] window, int[] shift) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"lamamba::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"lamamba::{_name}", "cpu", getattr(cpu, _name))

for _name in ("modulated_norm", "gated_norm", "local_mixing"):
    torch.library.register_fake(f"lamamba::{_name}", lambda x, *rest: x.new_empty(x.shape))


@torch.library.register_fake("lamamba::few_rows_linear")
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("lamamba::window_attention")
def _(qkv, *rest):
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


@register_flop_formula(torch.ops.lamamba.few_rows_linear)
def _few_rows_linear_flops(x_shape, weight_shape, *rest, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.lamamba.local_mixing)
def _local_mixing_flops(x_shape, weight_shape, *rest, out_shape=None, **kwargs) -> int:
    b, h, w, c = x_shape
    return 2 * 9 * b * h * w * c


@register_flop_formula(torch.ops.lamamba.window_attention)
def _window_attention_flops(qkv_shape, bias_shape, mask, num_heads, window, *rest, **kwargs) -> int:
    b, h, w, c3 = qkv_shape
    size = window[0] * window[1]
    return 2 * 2 * b * -(-h // window[0]) * -(-w // window[1]) * size * size * (c3 // 3)
