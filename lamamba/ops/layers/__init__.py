"""Fused layers between the matrix products: norms with modulation and gates, depthwise convolution, window attention.

Each is a formula of several PyTorch operations (`reference`), fused to one pass over the tokens by compiled kernels on
CPUs without gradients (`cpu`) and by Triton kernels on CUDA devices with gradients (`gpu`). Everywhere else the formula
runs. The requested back end (lamamba.ops.dispatch) may be "cpu" or "triton"; any other name means the formula.

    sizes: b images, h and w the grid, l = h w tokens, c channels
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lamamba.config import Grid
from lamamba.ops import native
from lamamba.ops.dispatch import needs_formula, requested_backend
from lamamba.ops.layers import cpu, gpu, reference
from lamamba.ops.selective_scan import OP, check_inputs, scan_flops, selective_scan

FEW_ROWS = {torch.float32: 8, torch.bfloat16: 2}
MANY_WEIGHTS = 2**18

INDUCTOR_FUSES = frozenset(
    ("modulated_norm", "gated_norm", "scan_gated_norm", "gated_sum", "gated_sum_norm", "linear_gelu"))
"""Layers whose formula torch.compile runs on GPUs: Inductor fuses them with their neighbours.

It does not fuse the copies that cut the grid into windows, nor the convolution, which it leaves to a library.
"""


def modulated_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-5,
) -> Tensor:
    """Adaptive LayerNorm, LayerNorm(x) (1 + scale) + shift (DiT, arXiv 2212.09748): (b, h, w, c).

    Args:
        x: (b, h, w, c).
        weight, bias: (c,) of LayerNorm, or None.
        shift, scale: (b, c).
        eps: added to the variance.
    """
    return _choose("modulated_norm", [x], [weight, bias, shift, scale])(x, weight, bias, shift, scale, eps)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear for few rows, x weight^T + bias: x (b, i), weight (o, i), bias (o,).

    The kernel runs where reading the weights dominates: there it is measured to be faster than PyTorch's product.
    """
    few = not torch.compiler.is_compiling() and x.shape[0] <= FEW_ROWS.get(x.dtype, 0)
    if few and weight.numel() >= MANY_WEIGHTS and _runs_on_cpu([x, weight, bias]):
        return torch.ops.lamamba.few_rows_linear(x, weight, bias)
    return reference.few_rows_linear(x, weight, bias)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Gated LayerNorm, LayerNorm(x) SiLU(z) (Mamba's output gate): x and z (b, h, w, c), weight and bias (c,)."""
    return _choose("gated_norm", [x, z], [weight, bias])(x, z, weight, bias, eps)


def scan_gated_norm(
    x: Tensor, z: Tensor, scan: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5,
) -> Tensor:
    """Gated LayerNorm of a selective scan, LayerNorm(y) SiLU(z) with y = selective_scan(x, *scan): (b, h, w, c).

    On a CUDA device without gradients the directions' outputs are summed inside the norm; elsewhere `selective_scan`,
    then `gated_norm`.

    Args:
        x, z: (b, h, w, c).
        scan: dt, B, C, W_dt, b_dt, A, D and paths of lamamba.ops.selective_scan, l = h w.
        weight, bias, eps: as in `gated_norm`.
    """
    tokens, A = x.flatten(1, 2), scan[5]
    parameters: list[Tensor | None] = [*scan[:-1], weight, bias]
    if not _needs_gradients(x, z, *parameters) and _runs_on_gpu("scan_gated_norm", [x, z], parameters) \
            and OP.choose(tokens, A.shape[2]) == "triton":
        check_inputs(tokens, *scan)
        return torch.ops.lamamba.gpu_scan_gated_norm(x, z, *scan, weight, bias, eps)
    return gated_norm(selective_scan(tokens, *scan).unflatten(1, x.shape[1:3]), z, weight, bias, eps)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Gated residual sum x + gate y: x and y (b, h, w, c), gate (b, c). Only its backward pass has a kernel."""
    needs = _needs_gradients(x, y, gate)
    if needs and _sum_has_type_of(x, y, gate) and _runs_on_gpu("gated_sum", [x], [y, gate]):
        return torch.ops.lamamba.gpu_gated_sum(x, y, gate)
    return reference.gated_sum(x, y, gate)


def gated_sum_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Gated residual sum and its modulated norm: what lies between two branches of a block.

        total = x + gate y,    LayerNorm(total) (1 + scale) + shift

    One kernel on a CUDA device without gradients; elsewhere `gated_sum`, then `modulated_norm`.

    Args:
        x, y, gate: as in `gated_sum`.
        weight, bias, shift, scale, eps: as in `modulated_norm`.
    """
    parameters = [y, gate, weight, bias, shift, scale]
    needs = _needs_gradients(x, *parameters)
    if not needs and _sum_has_type_of(x, y, gate) and _runs_on_gpu("gated_sum_norm", [x], parameters):
        return torch.ops.lamamba.gpu_gated_sum_norm(x, y, gate, weight, bias, shift, scale, eps)
    total = gated_sum(x, y, gate)
    return total, modulated_norm(total, weight, bias, shift, scale, eps)


def _sum_has_type_of(x: Tensor, y: Tensor, gate: Tensor) -> bool:
    return y.dtype == gate.dtype and x.dtype in (y.dtype, torch.float32)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (exact) of a Linear layer, GELU(x weight^T + bias): x (b, h, w, i), weight (o, i), bias (o,).

    One kernel for 16-bit numbers on a CUDA device without gradients, where i is so small that it is worth it.
    """
    fits = x.dtype == weight.dtype == bias.dtype != torch.float32 and x.shape[-1] <= gpu.MOST_GELU_DEPTH
    fits = fits and not _needs_gradients(x, weight, bias)
    if fits and _runs_on_gpu("linear_gelu", [x], [weight, bias]) and gpu.has_tiles(x.device):
        return torch.ops.lamamba.gpu_linear_gelu(x, weight, bias)
    return reference.linear_gelu(x, weight, bias)


def local_mixing(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a depthwise 3 x 3 convolution with zero padding: x (b, h, w, c), weight (c, 1, 3, 3)."""
    return _choose("local_mixing", [x], [weight])(x, weight)


def window_attention(
    qkv: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, window: Grid, shift: Grid,
) -> Tensor:
    """Attention within the windows of the grid rolled by -shift (Swin, arXiv 2103.14030): (b, h, w, c).

    Where the window does not divide the grid, zero tokens are added at the bottom and right.

    Args:
        qkv: (b, h, w, 3 c), queries, keys and values, each (heads, d).
        bias: (heads, tokens, tokens), added to the scores.
        mask: (windows, tokens, tokens) bool, True where a pair attends; None for all.
        num_heads: heads of d = c / num_heads channels.
        window, shift: (rows, columns) of a window and of the roll, in tokens.
    """
    if _runs_on_cpu([qkv]) and not _needs_gradients(bias):
        return torch.ops.lamamba.window_attention(qkv, bias, mask, num_heads, window, shift)
    if window[0] * window[1] <= gpu.MOST_WINDOW_TOKENS and _runs_on_gpu("window_attention", [qkv], [bias]):
        return torch.ops.lamamba.gpu_window_attention(qkv, bias, mask, num_heads, window, shift)
    return reference.window_attention(qkv, bias, mask, num_heads, window, shift)


def backend_for(x: Tensor) -> str:
    """Return what runs the layers on tokens like x (and with its gradients): "cpu", "triton", or "formula"."""
    if _runs_on_cpu([x]):
        return "cpu"
    return "triton" if _runs_on_gpu("modulated_norm", [x], []) else "formula"


def _choose(name: str, tokens: list[Tensor], parameters: list[Tensor | None]) -> Callable[..., Tensor]:
    """Return the function that runs this layer on these tensors."""
    if _runs_on_cpu([*tokens, *parameters]):
        return getattr(torch.ops.lamamba, name)
    if _runs_on_gpu(name, tokens, parameters):
        return getattr(torch.ops.lamamba, f"gpu_{name}")
    return getattr(reference, name)


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _needs_formula(tensors: list[Tensor | None]) -> bool:
    """Whether PyTorch's operations must run, also because of a tensor's own class (quantised weights)."""
    return needs_formula() or any(hasattr(tensor, "__tensor_flatten__") for tensor in tensors)


def _runs_on_cpu(tensors: list[Tensor | None]) -> bool:
    """Whether the compiled kernels support these tensors: on the CPU, of one dtype, without gradients."""
    x = tensors[0]
    assert x is not None
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES or _needs_gradients(*tensors) or _needs_formula(tensors):
        return False
    if any(other is not None and (other.dtype != x.dtype or other.device != x.device) for other in tensors):
        return False
    return x.numel() > 0 and requested_backend() in ("auto", "cpu") and _have_kernels()


def _runs_on_gpu(name: str, tokens: list[Tensor], parameters: list[Tensor | None]) -> bool:
    """Whether the Triton kernels support this layer: tokens of one dtype on a CUDA device, parameters of any dtype.

    Under autocast the parameters are float32 and the tokens 16-bit; y has the tokens' dtype.
    """
    x = tokens[0]
    if x.device.type != "cuda" and not (x.device.type == "cpu" and requested_backend() == "triton"):
        return False
    if any(other.dtype != x.dtype or other.device != x.device for other in tokens) or x.dtype not in gpu.DTYPES:
        return False
    if any(other is not None and (other.dtype not in gpu.DTYPES or other.device != x.device) for other in parameters):
        return False
    if (name in INDUCTOR_FUSES and torch.compiler.is_compiling()) or _needs_formula([*tokens, *parameters]):
        return False
    return x.numel() > 0 and requested_backend() in ("auto", "triton") and _have_triton(x.device.type)


@torch.compiler.assume_constant_result
def _have_kernels() -> bool:
    return native.load() is not None


@torch.compiler.assume_constant_result
def _have_triton(device_type: str) -> bool:
    return gpu.unsupported_reason(device_type) is None


def _fake(name, x, *rest):
    return x.new_empty((x.shape[0], rest[0].shape[0])) if name == "few_rows_linear" else gpu.fake(name, x)


# Not torch.library.custom_op: its checks double the cost of a call, and a forward pass makes a hundred of them.
for _name in ("modulated_norm", "gated_norm", "local_mixing", "window_attention", "few_rows_linear"):
    _arguments = gpu.SCHEMAS.get(_name, "Tensor x, Tensor weight, Tensor bias")
    torch.library.define(f"lamamba::{_name}", f"({_arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"lamamba::{_name}", "cpu", getattr(cpu, _name))
    torch.library.register_fake(f"lamamba::{_name}", functools.partial(_fake, _name))


@register_flop_formula(torch.ops.lamamba.gpu_linear_gelu)
def _linear_gelu_flops(x_shape, weight_shape, *rest, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.lamamba.gpu_scan_gated_norm)
def _scan_gated_norm_flops(x_shape, z, dt, B, C, W_dt_shape, b_dt, A_shape, *rest, **kwargs) -> int:
    b, h, w, c = x_shape
    return scan_flops((b, h * w, c), dt, B, C, W_dt_shape, b_dt, A_shape)


@register_flop_formula(torch.ops.lamamba.few_rows_linear)
def _few_rows_linear_flops(x_shape, weight_shape, *rest, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula([torch.ops.lamamba.local_mixing, torch.ops.lamamba.gpu_local_mixing])
def _local_mixing_flops(x_shape, weight_shape, *rest, **kwargs) -> int:
    b, h, w, c = x_shape
    return 2 * 9 * b * h * w * c


@register_flop_formula(torch.ops.lamamba.gpu_local_mixing_backward)
def _local_mixing_backward_flops(grad_shape, *shapes, **kwargs) -> int:
    return 3 * _local_mixing_flops(*shapes)                                     # s again, gradients of x and weight


@register_flop_formula([torch.ops.lamamba.window_attention, torch.ops.lamamba.gpu_window_attention])
def _window_attention_flops(qkv_shape, bias_shape, mask, num_heads, window, *rest, **kwargs) -> int:
    b, h, w, c3 = qkv_shape
    size = window[0] * window[1]
    return 2 * 2 * b * -(-h // window[0]) * -(-w // window[1]) * size * size * (c3 // 3)


@register_flop_formula(torch.ops.lamamba.gpu_window_attention_backward)
def _window_attention_backward_flops(grad_shape, *inputs, **kwargs) -> int:
    return 5 * _window_attention_flops(*inputs) // 2                            # five products instead of two
