"""The layers by the compiled CPU kernels of lamamba/csrc/layers.cpp, without gradients."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lamamba.config import Grid
from lamamba.ops import native
from lamamba.ops.native import unit_stride

DTYPES = (torch.float32, torch.bfloat16)


_STRUCTS = {name: native.struct(f"threads is_bfloat16 {fields}") for name, fields in {
    "lamamba_modulated_norm": "b l c %eps *x *weight *bias *shift *scale shift_b scale_b *y",
    "lamamba_gated_norm": "rows c %eps *x *z z_row *weight *bias *y",
    "lamamba_convolution": "b h w c *x x_b x_h x_w *weight *y",
    "lamamba_window_attention": "b h w heads d window_h window_w shift_h shift_w *qkv *bias *mask *y",
    "lamamba_few_rows": "rows inputs outputs *x *weight *bias *y",
    "lamamba_quantized_rows": "rows c *x *q *scale",
    "lamamba_scaled_products": "rows c *products *row_scale *column_scale *bias *y",
}.items()}


def _run(name: str, *values) -> Tensor:
    """Call a function with the fields of its struct, tensors as their addresses; the last one is the output."""
    library, y = native.load(), values[-1]
    is_bfloat16 = any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in values)
    assert library is not None                                                  # checked by lamamba.ops.layers
    plain = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
    function = getattr(library, name)
    function.restype = None
    function(ctypes.byref(_STRUCTS[name](native.num_threads(), is_bfloat16, *plain)))
    return y


def modulated_norm(x, weight, bias, shift, scale, eps) -> Tensor:
    x, shift, scale = x.contiguous(), unit_stride(shift), unit_stride(scale)
    weight, bias = (None if part is None else part.contiguous() for part in (weight, bias))
    b, h, w, c = x.shape
    return _run("lamamba_modulated_norm", b, h * w, c, eps, x, weight, bias, shift, scale, shift.stride(0),
                scale.stride(0), torch.empty_like(x))


def gated_norm(x, z, weight, bias, eps) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    z = unit_stride(z.reshape(-1, z.shape[-1]))                                 # a view where rows are evenly spaced
    return _run("lamamba_gated_norm", *z.shape, eps, x, z, z.stride(0), weight, bias, torch.empty_like(x))


def local_mixing(x, weight) -> Tensor:
    x, weight = unit_stride(x), weight.flatten(1).T.float().contiguous()        # (9, c)
    return _run("lamamba_convolution", *x.shape, x, *x.stride()[:3], weight, torch.empty(x.shape, dtype=x.dtype))


def window_attention(qkv, bias, mask, num_heads: int, window: Grid, shift: Grid) -> Tensor:
    qkv, bias = qkv.contiguous(), bias.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    b, h, w, c = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    return _run("lamamba_window_attention", b, h, w, num_heads, c // num_heads, *window, *shift, qkv, bias, mask,
                torch.empty((b, h, w, c), dtype=qkv.dtype))


def few_rows_linear(x, weight, bias) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    return _run("lamamba_few_rows", *x.shape, weight.shape[0], x, weight, bias, y)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 q (rows, c) and float32 scale (rows, 1), x = q scale to rounding: scale = max |x| / 127 of each row of x.

    A row that is not finite has the scale NaN.
    """
    x = x.contiguous()
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty((x.shape[0], 1))
    _run("lamamba_quantized_rows", *x.shape, x, q, scale)
    return q, scale


def scale_products(products, row_scale, column_scale, bias, dtype: torch.dtype) -> Tensor:
    """products row_scale column_scale + bias: int32 (rows, c), float32 (rows, 1), (c,) and (c,)."""
    y = torch.empty(products.shape, dtype=dtype)
    return _run("lamamba_scaled_products", *products.shape, products, row_scale, column_scale, bias, y)
