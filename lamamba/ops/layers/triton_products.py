"""GELU of a Linear layer as one Triton kernel: the tokens of the hidden width are written once and not read again.

    y = GELU(x weight^T + bias),    GELU(s) = s / 2 (1 + erf(s / sqrt(2)))

The libraries' products have GELU's approximation by tanh at most. One program computes ROWS x COLUMNS of y, and sums
over DEPTH channels of x, CHUNK at a time, in float32. Programs that run together share rows of x and of the weight in
the L2 cache: they go down GROUP blocks of rows before they go on to the next columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamamba.ops.triton_utils import contiguous, matrix_product, on_tensor_device, round_to

ROWS, COLUMNS, CHUNK, GROUP = 128, 128, 64, 8
WARPS, STAGES = 8, 3


@triton.jit(do_not_specialize=("tokens",))
def _linear_gelu(
    x, weight, bias, y,
    tokens, width,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):
    """y (tokens, width) from x (tokens, DEPTH), weight (width, DEPTH) and bias (width,)."""
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(width, COLUMNS)
    group = tl.program_id(0) // (GROUP * across)
    in_group = tl.minimum(down - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    rows = (group * GROUP + place % in_group) * ROWS + tl.arange(0, ROWS)
    columns = place // in_group * COLUMNS + tl.arange(0, COLUMNS)
    x += rows.to(tl.int64)[:, None] * DEPTH
    weight += columns[None, :] * DEPTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, DEPTH, CHUNK):
        channels = first + tl.arange(0, CHUNK)
        row_mask, column_mask = (rows < tokens)[:, None], (columns < width)[None, :]
        if DEPTH % CHUNK != 0:
            row_mask = row_mask & (channels < DEPTH)[None, :]
            column_mask = column_mask & (channels < DEPTH)[:, None]
        a = tl.load(x + channels[None, :], mask=row_mask, other=0.0)
        b = tl.load(weight + channels[:, None], mask=column_mask, other=0.0)
        total = matrix_product(a, b, total)
    total += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    total *= 0.5 * (1 + tl.erf(total * 0.7071067811865476))
    y += rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(y, round_to(total, y.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < width)[None, :])


@on_tensor_device
def linear_gelu(x, weight, bias):
    x, weight, bias = contiguous(x, weight, bias)
    width, depth = weight.shape
    y = x.new_empty((*x.shape[:-1], width))
    tokens = x.numel() // depth
    if tokens:
        _linear_gelu[(triton.cdiv(tokens, ROWS) * triton.cdiv(width, COLUMNS),)](
            x, weight, bias, y, tokens, width, DEPTH=depth, ROWS=ROWS, COLUMNS=COLUMNS, CHUNK=CHUNK, GROUP=GROUP,
            num_warps=WARPS, num_stages=STAGES,
        )
    return y
