"""Selective scan by the compiled CPU kernels of lamamba/csrc/selective_scan.cpp.

float32, bfloat16 and float16 inputs; the state and all sums are float32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lamamba.ops import native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_Scan = native.struct(
    "b l c g r n threads is_bfloat16 *x x_b x_l *dt dt_b dt_l dt_g *B B_b B_l B_g *C C_b C_l C_g *W_dt *b_dt *A *D "
    "*paths *workspace *y *gy gy_b gy_l *gx *gdt *gB *gC *gW_dt *gb_dt *gA *gD"
)
"""struct Scan of lamamba/csrc/selective_scan.cpp."""


def unsupported_reason(device_type: str, dtype: torch.dtype, state_size: int) -> str | None:
    if device_type != "cpu":
        return f"it runs on CPUs and the tensors are on {device_type}"
    if dtype not in _DTYPES:
        return f"it computes in float32 and x is {dtype}; the back end 'torch' takes every precision"
    if native.load() is None:
        return f"lamamba was installed without its compiled CPU kernels; {native.HOW_TO_BUILD}"
    return None


def _dtype(x: Tensor) -> torch.dtype:
    """Of the tokens that the kernel reads and writes."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _run(name: str, inputs, tensors: dict[str, Tensor]) -> None:
    """Call a kernel with the inputs as it reads them, and the other tensors of its struct by name."""
    x, dt, B, C, W_dt, b_dt, A, D, paths = inputs
    x, paths = native.unit_stride(x.to(_dtype(x))), paths.contiguous()
    dt, B, C = (native.unit_stride(tokens.float()) for tokens in (dt, B, C))
    W_dt, b_dt, A, D = (tensor.float().contiguous() for tensor in (W_dt, b_dt, A, D))
    (b, l, c), (g, _, n), r = x.shape, A.shape, W_dt.shape[2]
    scan = _Scan(
        b, l, c, g, r, n, native.num_threads(), x.dtype == torch.bfloat16, x.data_ptr(), *x.stride()[:2],
        dt.data_ptr(), *dt.stride()[:3], B.data_ptr(), *B.stride()[:3], C.data_ptr(), *C.stride()[:3],
        W_dt.data_ptr(), b_dt.data_ptr(), A.data_ptr(), D.data_ptr(), paths.data_ptr(),
    )
    for field, tensor in tensors.items():
        setattr(scan, field, tensor.data_ptr())
    if "gy" in tensors:
        scan.gy_b, scan.gy_l, _ = tensors["gy"].stride()
    library = native.load()
    assert library is not None                                                  # checked by unsupported_reason()
    library.lamamba_selective_scan_workspace.restype = ctypes.c_int64
    workspace = torch.empty(library.lamamba_selective_scan_workspace(ctypes.byref(scan), "gy" in tensors))
    scan.workspace = workspace.data_ptr()
    if getattr(library, f"lamamba_selective_scan_{name}")(ctypes.byref(scan)):
        raise ValueError(f"paths hold tokens outside 0 .. {l - 1}")


def forward(x, dt, B, C, W_dt, b_dt, A, D, paths):
    """As in the reference."""
    if x.numel() == 0:
        return torch.empty_like(x)
    y = torch.empty(x.shape, dtype=_dtype(x))
    _run("forward", (x, dt, B, C, W_dt, b_dt, A, D, paths), {"y": y})
    return y.to(x.dtype)


def backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths):
    """As in the reference; the states are recomputed."""
    inputs = (x, dt, B, C, W_dt, b_dt, A, D)
    if x.numel() == 0:
        return tuple(tensor.new_zeros(tensor.shape) for tensor in inputs)
    gy = native.unit_stride(grad_y.to(_dtype(x)))
    grads = [torch.empty(x.shape, dtype=gy.dtype), *(torch.empty(tensor.shape) for tensor in inputs[1:])]
    names = ("gx", "gdt", "gB", "gC", "gW_dt", "gb_dt", "gA", "gD")
    _run("backward", (*inputs, paths), {"gy": gy, **dict(zip(names, grads, strict=True))})
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))
