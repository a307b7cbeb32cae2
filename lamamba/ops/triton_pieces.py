"""What the Triton kernels of several rooms share: rounding and products that the interpreter also gets right."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels decorated in this process run on CPU tensors, by TRITON_INTERPRET=1."""


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """float32 in a memory type, to the nearest number; the interpreter by itself would cut bfloat16's digits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(value == value, nearest, bits).to(tl.float32, bitcast=True).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def matrix_product(a, b, total):
    """total + a @ b in float32: 16-bit factors on the matrix units, float32 ones exactly.

    The interpreter multiplies no bfloat16.
    """
    if a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee")
    elif INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


def on_the_tensors_device(run):
    """Triton launches on the current device; make that the first argument's."""

    @functools.wraps(run)
    def run_there(tensor, *args, **kwargs):
        with torch.cuda.device_of(tensor):
            return run(tensor, *args, **kwargs)

    return run_there


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's device; 1 under the interpreter."""
    if tensor.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
