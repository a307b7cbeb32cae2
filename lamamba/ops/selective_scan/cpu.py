"""Selective scan by the compiled CPU kernels of lamamba/csrc/selective_scan.cpp.

float32, bfloat16 and float16 inputs; the state and all sums are float32.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from lamamba.ops import native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Scan(ctypes.Structure):
    """Mirrors struct Scan of lamamba/csrc/selective_scan.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("b", "l", "c", "g", "r", "n", "threads", "is_bfloat16")),
        ("x", c_void_p), ("x_b", c_int64), ("x_l", c_int64),
        *((f"{name}{part}", c_int64 if part else c_void_p)
          for name in ("dt", "B", "C") for part in ("", "_b", "_l", "_g")),
        *((name, c_void_p) for name in ("W_dt", "b_dt", "A", "D", "paths", "workspace", "y")),
        ("gy", c_void_p), ("gy_b", c_int64), ("gy_l", c_int64),
        *((name, c_void_p) for name in ("gx", "gdt", "gB", "gC", "gW_dt", "gb_dt", "gA", "gD")),
    )


def unsupported_reason(device_type: str, dtype: torch.dtype, state_size: int) -> str | None:
    if device_type != "cpu":
        return f"it runs on CPUs and the tensors are on {device_type}"
    if dtype not in _DTYPES:
        return f"it computes in float32 and x is {dtype}; the back end 'torch' takes every precision"
    if native.load() is None:
        return f"lamamba was installed without its compiled CPU kernels; {native.HOW_TO_BUILD}"
    return None


def _tokens(x: Tensor) -> Tensor:
    """Convert to a dtype and strides that the kernel reads."""
    return native.unit_stride(x.float() if x.dtype == torch.float16 else x)


class _Call:
    """The inputs of a call as the kernel reads them, referenced while it runs."""

    def __init__(self, x, dt, B, C, W_dt, b_dt, A, D, paths) -> None:
        self.x, self.paths = _tokens(x), paths.contiguous()
        dt, B, C = self.projections = [native.unit_stride(tokens.float()) for tokens in (dt, B, C)]
        W_dt, b_dt, A, D = self.parameters = [tensor.float().contiguous() for tensor in (W_dt, b_dt, A, D)]
        (b, l, c), (g, _, n), r = x.shape, A.shape, W_dt.shape[2]
        self.scan = _Scan(
            b, l, c, g, r, n, native.num_threads(), self.x.dtype == torch.bfloat16,
            self.x.data_ptr(), *self.x.stride()[:2],
            dt.data_ptr(), *dt.stride()[:3], B.data_ptr(), *B.stride()[:3], C.data_ptr(), *C.stride()[:3],
            W_dt.data_ptr(), b_dt.data_ptr(), A.data_ptr(), D.data_ptr(), self.paths.data_ptr(),
        )

    def run(self, name: str, *, backward: bool) -> None:
        library = native.load()
        assert library is not None                                              # checked by unsupported_reason()
        library.lamamba_selective_scan_workspace.restype = c_int64
        scan = ctypes.byref(self.scan)
        workspace = torch.empty(library.lamamba_selective_scan_workspace(scan, backward))
        self.scan.workspace = workspace.data_ptr()
        if getattr(library, name)(scan):
            raise ValueError(f"paths hold tokens outside 0 .. {self.scan.l - 1}")


def forward(x, dt, B, C, W_dt, b_dt, A, D, paths):
    """As in the reference."""
    if x.numel() == 0:
        return torch.empty_like(x)
    call = _Call(x, dt, B, C, W_dt, b_dt, A, D, paths)
    y = torch.empty(x.shape, dtype=call.x.dtype)
    call.scan.y = y.data_ptr()
    call.run("lamamba_selective_scan_forward", backward=False)
    return y.to(x.dtype)


def backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths):
    """As in the reference; the states are recomputed."""
    inputs = (x, dt, B, C, W_dt, b_dt, A, D)
    if x.numel() == 0:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    call = _Call(*inputs, paths)
    gy = _tokens(grad_y.to(call.x.dtype))
    gx = torch.empty(x.shape, dtype=call.x.dtype)
    grads = [gx, *(torch.empty(tensor.shape) for tensor in inputs[1:])]
    call.scan.gy, (call.scan.gy_b, call.scan.gy_l, _) = gy.data_ptr(), gy.stride()
    for name, grad in zip(("gx", "gdt", "gB", "gC", "gW_dt", "gb_dt", "gA", "gD"), grads, strict=True):
        setattr(call.scan, name, grad.data_ptr())
    call.run("lamamba_selective_scan_backward", backward=True)
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))
