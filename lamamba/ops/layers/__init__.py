"""What a network does between its matrix products: norms, conditions, local mixing, windows.

Each is one formula of several PyTorch operations (`reference`). Kernels make it one pass over the tokens: compiled ones
(`cpu`) on CPUs where nobody asks for gradients, Triton's (`gpu`) on CUDA devices, with gradients. Everywhere else the
formula itself runs. The back end in force (lamamba.ops.dispatch) may be "cpu" or "triton"; any other name means the
formula.

    sizes: b images, h and w the grid, l = h w tokens, c channels
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lamamba.config import Grid
from lamamba.ops import native
from lamamba.ops.dispatch import backend_in_force
from lamamba.ops.layers import cpu, gpu, reference

FEW_ROWS = {torch.float32: 8, torch.bfloat16: 2}
MANY_WEIGHTS = 2**18

INDUCTOR_FUSES = frozenset(("modulated_norm", "gated_norm", "gated_sum"))
"""On GPUs, what torch.compile makes one pass of itself, together with its neighbours: there the formula is left to it.

It has no such answer to windows, which it would cut up in memory, nor to the convolution, which it leaves to a library.
"""


def modulated_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-5,
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift: x (b, h, w, c), weight and bias (c,), shift and scale (b, c)."""
    return _choose("modulated_norm", [x], [weight, bias, shift, scale])(x, weight, bias, shift, scale, eps)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias: x (b, i), weight (o, i), bias (o,).

    Compiled for so few rows that reading the weights is the work, where it beats PyTorch's product (measured).
    """
    few = not torch.compiler.is_compiling() and x.shape[0] <= FEW_ROWS.get(x.dtype, 0)
    if few and weight.numel() >= MANY_WEIGHTS and _runs_on_cpu([x, weight, bias]):
        return torch.ops.lamamba.few_rows_linear(x, weight, bias)
    return reference.few_rows_linear(x, weight, bias)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x) SiLU(z): x and z (b, h, w, c), weight and bias (c,)."""
    return _choose("gated_norm", [x, z], [weight, bias])(x, z, weight, bias, eps)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y: x and y (b, h, w, c), gate (b, c). PyTorch's own forward pass; a kernel for the backward pass."""
    fits = y.dtype == gate.dtype and x.dtype in (y.dtype, torch.float32)        # the sum has x's type
    if fits and _wants_gradients(x, y, gate) and _runs_on_gpu("gated_sum", [x], [y, gate]):
        return torch.ops.lamamba.gpu_gated_sum(x, y, gate)
    return reference.gated_sum(x, y, gate)


def local_mixing(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a 3 x 3 convolution of every channel by itself: x (b, h, w, c), weight (c, 1, 3, 3), zeros around."""
    return _choose("local_mixing", [x], [weight])(x, weight)


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
    if _runs_on_cpu([qkv]) and not _wants_gradients(bias):
        return torch.ops.lamamba.window_attention(qkv, bias, mask, num_heads, window, shift)
    if window[0] * window[1] <= gpu.MOST_WINDOW_TOKENS and _runs_on_gpu("window_attention", [qkv], [bias]):
        return torch.ops.lamamba.gpu_window_attention(qkv, bias, mask, num_heads, window, shift)
    return reference.window_attention(qkv, bias, mask, num_heads, window, shift)


def backend_for(x: Tensor) -> str:
    """What takes tokens like these (with gradients, if x wants them): "cpu", "triton", or "formula"."""
    if _runs_on_cpu([x]):
        return "cpu"
    return "triton" if _runs_on_gpu("modulated_norm", [x], []) else "formula"


def _choose(name: str, tokens: list[Tensor], parameters: list[Tensor | None]) -> Callable[..., Tensor]:
    """What runs this layer on these tensors: compiled on CPUs, Triton on GPUs, or the formula."""
    if _runs_on_cpu([*tokens, *parameters]):
        return getattr(torch.ops.lamamba, name)
    if _runs_on_gpu(name, tokens, parameters):
        return getattr(torch.ops.lamamba, f"gpu_{name}")
    return getattr(reference, name)


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _runs_on_cpu(tensors: list[Tensor | None]) -> bool:
    """Whether the compiled kernels take these tensors: on the CPU, of one type, and nobody asks for gradients."""
    x = tensors[0]
    assert x is not None
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES or _wants_gradients(*tensors):
        return False
    if any(other is not None and (other.dtype != x.dtype or other.device != x.device) for other in tensors):
        return False
    return x.numel() > 0 and backend_in_force() in ("auto", "cpu") and _have_kernels()


def _runs_on_gpu(name: str, tokens: list[Tensor], parameters: list[Tensor | None]) -> bool:
    """Whether Triton's kernels take this layer: tokens of one type on a CUDA device, parameters of any type there.

    Under autocast the parameters are float32 and the tokens 16-bit numbers; y has the tokens' type.
    """
    x = tokens[0]
    if x.device.type != "cuda" and not (x.device.type == "cpu" and backend_in_force() == "triton"):
        return False
    if any(other.dtype != x.dtype or other.device != x.device for other in tokens) or x.dtype not in gpu.DTYPES:
        return False
    if any(other is not None and (other.dtype not in gpu.DTYPES or other.device != x.device) for other in parameters):
        return False
    if name in INDUCTOR_FUSES and torch.compiler.is_compiling():
        return False
    return x.numel() > 0 and backend_in_force() in ("auto", "triton") and _have_triton(x.device.type)


@torch.compiler.assume_constant_result
def _have_kernels() -> bool:
    return native.load() is not None


@torch.compiler.assume_constant_result
def _have_triton(device_type: str) -> bool:
    return gpu.unsupported_reason(device_type) is None


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


@register_flop_formula([torch.ops.lamamba.local_mixing, torch.ops.lamamba.gpu_local_mixing])
def _local_mixing_flops(x_shape, weight_shape, *rest, out_shape=None, **kwargs) -> int:
    b, h, w, c = x_shape
    return 2 * 9 * b * h * w * c


@register_flop_formula(torch.ops.lamamba.gpu_local_mixing_backward)
def _local_mixing_backward_flops(grad_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 3 * _local_mixing_flops(*shapes)                                     # s again, then x and the weights


@register_flop_formula([torch.ops.lamamba.window_attention, torch.ops.lamamba.gpu_window_attention])
def _window_attention_flops(qkv_shape, bias_shape, mask, num_heads, window, *rest, **kwargs) -> int:
    b, h, w, c3 = qkv_shape
    size = window[0] * window[1]
    return 2 * 2 * b * -(-h // window[0]) * -(-w // window[1]) * size * size * (c3 // 3)


@register_flop_formula(torch.ops.lamamba.gpu_window_attention_backward)
def _window_attention_backward_flops(grad_shape, *inputs, out_shape=None, **kwargs) -> int:
    return 5 * _window_attention_flops(*inputs) // 2                            # five products where there were two
