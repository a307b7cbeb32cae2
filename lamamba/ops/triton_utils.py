"""Helpers shared by the Triton kernels: rounding and products that are also right under the interpreter, launching."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels decorated in this process run on CPU tensors, by TRITON_INTERPRET=1."""


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round float32 to nearest in another type; the interpreter itself truncates to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(value == value, nearest, bits).to(tl.float32, bitcast=True).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def matrix_product(a, b, total):
    """Compute total + a @ b in float32: 16-bit factors on the matrix units, float32 ones without TF32.

    The interpreter has no bfloat16 product.
    """
    if a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee")
    elif INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


def on_tensor_device(function):
    """Decorate a function so that it runs with its first argument's device current: Triton launches on that."""

    @functools.wraps(function)
    def wrapper(tensor, *args, **kwargs):
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return wrapper


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return contiguous tensors, and None for None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def num_processors(tensor: torch.Tensor) -> int:
    """Return the number of multiprocessors of the tensor's device; 1 under the interpreter."""
    if tensor.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
