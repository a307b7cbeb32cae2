"""The layers by the compiled CPU kernels of lamamba/csrc/layers.cpp, without gradients."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from lamamba.config import Grid
from lamamba.ops import native
from lamamba.ops.native import unit_stride

DTYPES = (torch.float32, torch.bfloat16)


def _fields(*fields: tuple[str, type]) -> tuple:
    """The fields that all structs of layers.cpp begin with, then a struct's own."""
    return ("threads", c_int64), ("is_bfloat16", c_int64), *fields


def _of(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _ModulatedNorm(ctypes.Structure):
    _fields_ = _fields(
        *_of(c_int64, "b l c"), ("eps", c_float), *_of(c_void_p, "x weight bias shift scale"),
        *_of(c_int64, "shift_b scale_b"), ("y", c_void_p),
    )


class _GatedNorm(ctypes.Structure):
    _fields_ = _fields(
        *_of(c_int64, "rows c"), ("eps", c_float), *_of(c_void_p, "x z"), ("z_row", c_int64),
        *_of(c_void_p, "weight bias y"),
    )


class _Convolution(ctypes.Structure):
    _fields_ = _fields(
        *_of(c_int64, "b h w c"), ("x", c_void_p), *_of(c_int64, "x_b x_h x_w"), *_of(c_void_p, "weight y"),
    )


class _Windows(ctypes.Structure):
    _fields_ = _fields(
        *_of(c_int64, "b h w heads d window_h window_w shift_h shift_w"), *_of(c_void_p, "qkv bias mask y"),
    )


class _FewRows(ctypes.Structure):
    _fields_ = _fields(*_of(c_int64, "rows inputs outputs"), *_of(c_void_p, "x weight bias y"))


def _run(name: str, kind: type[ctypes.Structure], x: Tensor, *values) -> None:
    library = native.load()
    assert library is not None                                                  # checked by lamamba.ops.layers
    call = kind(native.num_threads(), x.dtype == torch.bfloat16, *values)
    function = getattr(library, name)
    function.restype = None
    function(ctypes.byref(call))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def modulated_norm(x, weight, bias, shift, scale, eps) -> Tensor:
    x, shift, scale = x.contiguous(), unit_stride(shift), unit_stride(scale)
    weight, bias = (None if part is None else part.contiguous() for part in (weight, bias))
    (b, h, w, c), y = x.shape, torch.empty_like(x)
    _run("lamamba_modulated_norm", _ModulatedNorm, x, b, h * w, c, eps,
         x.data_ptr(), _address(weight), _address(bias), shift.data_ptr(), scale.data_ptr(),
         shift.stride(0), scale.stride(0), y.data_ptr())
    return y


def gated_norm(x, z, weight, bias, eps) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    z, y = unit_stride(z.reshape(-1, z.shape[-1])), torch.empty_like(x)         # a view where rows are evenly spaced
    _run("lamamba_gated_norm", _GatedNorm, x, *z.shape, eps, x.data_ptr(), z.data_ptr(), z.stride(0),
         weight.data_ptr(), bias.data_ptr(), y.data_ptr())
    return y


def local_mixing(x, weight) -> Tensor:
    x, y = unit_stride(x), torch.empty(x.shape, dtype=x.dtype)
    weight = weight.flatten(1).T.float().contiguous()                           # (9, c)
    _run("lamamba_convolution", _Convolution, x, *x.shape, x.data_ptr(), *x.stride()[:3], weight.data_ptr(),
         y.data_ptr())
    return y


def window_attention(qkv, bias, mask, num_heads: int, window: Grid, shift: Grid) -> Tensor:
    qkv, bias = qkv.contiguous(), bias.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    b, h, w, c = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    y = torch.empty((b, h, w, c), dtype=qkv.dtype)
    _run("lamamba_window_attention", _Windows, qkv, b, h, w, num_heads, c // num_heads, *window, *shift,
         qkv.data_ptr(), bias.data_ptr(), _address(mask), y.data_ptr())
    return y


def few_rows_linear(x, weight, bias) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    _run("lamamba_few_rows", _FewRows, x, *x.shape, weight.shape[0], x.data_ptr(), weight.data_ptr(),
         bias.data_ptr(), y.data_ptr())
    return y
