"""Window attention as Triton kernels that read queries, keys and values in grid order.

    S = q k^T / sqrt(d) + bias,    P = softmax of S over the unmasked keys,    y = P v

One program computes one head of several windows in turn. Padding and the roll are address arithmetic: the grid is not
copied into windows. The scores of a window (at most 64 x 64) are in registers; a head's channels are loaded CHUNK at a
time, so that all head sizes share a kernel.

The backward pass recomputes P:

    gP = gy v^T,    gS = P (gP - sum over keys of P gP),    gq = gS k,    gk = gS^T q,    gv = P^T gy

A program sums its windows' gS, the gradient of the bias, in registers; a second pass adds the programs' sums in a fixed
order. Products have factors of qkv's dtype and float32 sums; softmax is float32.

    sizes: b images, h and w the grid, d channels of a head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lamamba.config import Grid
from lamamba.ops.triton_utils import contiguous, matrix_product, num_processors, on_tensor_device, round_to

CHUNK = 16
"""The smallest depth of a matrix instruction; larger chunks need more registers."""
FORWARD_WARPS, BACKWARD_WARPS = 4, 8
MOST_REGISTERS = 255
"""Of a thread, where the compiler's own choice spills a few."""
PROGRAMS_PER_PROCESSOR = 8
"""More would balance the windows better, but each has its own sum for the bias."""
SIZES = ("units", "units_each", "h", "w", "rows", "columns", "shift_h", "shift_w")
"""Arguments that no address's alignment depends on: one compilation serves all their values."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tokens(unit, h, w, rows, columns, shift_h, shift_w, H: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr):
    """First token of a window's image, index of each of the window's tokens in it, and whether it lies in the grid."""
    window, token = unit % (rows * columns), tl.arange(0, TOKENS)
    row = (window // columns * H + token // W + shift_h) % (rows * H)
    column = (window % columns * W + token % W + shift_w) % (columns * W)
    begin = (unit // (rows * columns)).to(tl.int64) * (h * w)
    return begin, row * w + column, (token < H * W) & (row < h) & (column < w)


@triton.jit
def _load(x, tokens, in_grid, first, stride, D: tl.constexpr, CHUNK: tl.constexpr):
    """Load CHUNK channels of a head from the first on, (tokens, CHUNK); x points at the head of token 0."""
    channels = first + tl.arange(0, CHUNK)
    return tl.load(
        x + tokens[:, None] * stride + channels[None, :], mask=in_grid[:, None] & (channels < D)[None, :], other=0.0
    )


@triton.jit
def _load_transposed(x, tokens, in_grid, first, stride, D: tl.constexpr, CHUNK: tl.constexpr):
    """As _load, but (CHUNK, tokens)."""
    channels = first + tl.arange(0, CHUNK)
    return tl.load(
        x + tokens[None, :] * stride + channels[:, None], mask=in_grid[None, :] & (channels < D)[:, None], other=0.0
    )


@triton.jit
def _store(x, value, tokens, in_grid, first, stride, D: tl.constexpr, CHUNK: tl.constexpr):
    channels = first + tl.arange(0, CHUNK)
    tl.store(
        x + tokens[:, None] * stride + channels[None, :], round_to(value, x.dtype.element_ty),
        mask=in_grid[:, None] & (channels < D)[None, :],
    )


@triton.jit
def _probabilities(
    q, k, bias, mask, tokens, in_grid, stride, scale,
    D: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
):
    """P (queries, keys) of one head and window. bias and mask point at its (SIZE, SIZE) entries; mask may be None."""
    s = tl.zeros((TOKENS, TOKENS), tl.float32)
    for first in range(0, D, CHUNK):
        s = matrix_product(
            _load(q, tokens, in_grid, first, stride, D, CHUNK),
            _load_transposed(k, tokens, in_grid, first, stride, D, CHUNK), s,
        )
    query, key = tl.arange(0, TOKENS)[:, None], tl.arange(0, TOKENS)[None, :]
    pair = query * SIZE + key
    inside = (query < SIZE) & (key < SIZE)
    s = s * scale + tl.load(bias + pair, mask=inside, other=0.0).to(tl.float32)
    attends = key < SIZE
    if mask is not None:
        attends = attends & (tl.load(mask + pair, mask=inside, other=1) != 0)
    s = tl.where(attends, s * LOG2_E, float("-inf"))
    largest = tl.max(s, 1)
    p = tl.exp2(s - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    total = tl.sum(p, 1)
    return p / tl.where(total == 0, 1.0, total)[:, None]                        # fully masked queries: 0


@triton.jit(do_not_specialize=SIZES)
def _attend(
    qkv, bias, mask, y,
    units, units_each, h, w, rows, columns, shift_h, shift_w, heads, scale,
    H: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):
    """y (b, h, w, heads d). A unit is one window of one image."""
    head, share = tl.program_id(0) % heads, tl.program_id(0) // heads
    SIZE: tl.constexpr = H * W
    width = heads * D
    qkv += head * D
    y += head * D
    bias += head * (SIZE * SIZE)
    for unit in range(share * units_each, tl.minimum((share + 1) * units_each, units)):
        begin, tokens, in_grid = _tokens(unit, h, w, rows, columns, shift_h, shift_w, H, W, TOKENS)
        window_mask = None if mask is None else mask + unit % (rows * columns) * (SIZE * SIZE)
        q = qkv + begin * (3 * width)
        p = _probabilities(q, q + width, bias, window_mask, tokens, in_grid, 3 * width, scale, D, CHUNK, SIZE, TOKENS)
        p = round_to(p, q.dtype.element_ty)
        for first in range(0, D, CHUNK):
            v = _load(q + 2 * width, tokens, in_grid, first, 3 * width, D, CHUNK)
            part = matrix_product(p, v, tl.zeros((TOKENS, CHUNK), tl.float32))
            _store(y + begin * width, part, tokens, in_grid, first, width, D, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def _attend_backward(
    grad_y, qkv, bias, mask, grad_qkv, sums,
    units, units_each, h, w, rows, columns, shift_h, shift_w, heads, scale,
    H: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):
    """grad_qkv (b, h, w, 3 heads d), and this program's summand of the bias's: sums (shares, heads, SIZE, SIZE)."""
    head, share = tl.program_id(0) % heads, tl.program_id(0) // heads
    SIZE: tl.constexpr = H * W
    width = heads * D
    qkv += head * D
    grad_qkv += head * D
    grad_y += head * D
    bias += head * (SIZE * SIZE)
    sum_gs = tl.zeros((TOKENS, TOKENS), tl.float32)
    for unit in range(share * units_each, tl.minimum((share + 1) * units_each, units)):
        begin, tokens, in_grid = _tokens(unit, h, w, rows, columns, shift_h, shift_w, H, W, TOKENS)
        window_mask = None if mask is None else mask + unit % (rows * columns) * (SIZE * SIZE)
        q, gq, gy = qkv + begin * (3 * width), grad_qkv + begin * (3 * width), grad_y + begin * width
        p = _probabilities(q, q + width, bias, window_mask, tokens, in_grid, 3 * width, scale, D, CHUNK, SIZE, TOKENS)
        gp = tl.zeros((TOKENS, TOKENS), tl.float32)
        for first in range(0, D, CHUNK):
            gp = matrix_product(
                _load(gy, tokens, in_grid, first, width, D, CHUNK),
                _load_transposed(q + 2 * width, tokens, in_grid, first, 3 * width, D, CHUNK), gp,
            )
        gs = p * (gp - tl.sum(p * gp, 1)[:, None])
        sum_gs += gs
        p, gs = round_to(p, q.dtype.element_ty), round_to(gs, q.dtype.element_ty)
        zeros = tl.zeros((TOKENS, CHUNK), tl.float32)
        for first in range(0, D, CHUNK):
            part = matrix_product(gs, _load(q + width, tokens, in_grid, first, 3 * width, D, CHUNK), zeros)
            _store(gq, part * scale, tokens, in_grid, first, 3 * width, D, CHUNK)
            part = matrix_product(tl.trans(gs), _load(q, tokens, in_grid, first, 3 * width, D, CHUNK), zeros)
            _store(gq + width, part * scale, tokens, in_grid, first, 3 * width, D, CHUNK)
            part = matrix_product(tl.trans(p), _load(gy, tokens, in_grid, first, width, D, CHUNK), zeros)
            _store(gq + 2 * width, part, tokens, in_grid, first, 3 * width, D, CHUNK)
    query, key = tl.arange(0, TOKENS)[:, None], tl.arange(0, TOKENS)[None, :]
    sums += tl.program_id(0).to(tl.int64) * (SIZE * SIZE)
    tl.store(sums + query * SIZE + key, sum_gs, mask=(query < SIZE) & (key < SIZE))


def _sizes(qkv, num_heads, window, shift):
    """Number of shares of the windows, size arguments of both kernels, and their constants."""
    b, h, w, c3 = qkv.shape
    d = c3 // 3 // num_heads
    rows, columns = triton.cdiv(h, window[0]), triton.cdiv(w, window[1])
    units = b * rows * columns
    shares = max(min(units, triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors(qkv), num_heads)), 1)
    each = max(triton.cdiv(units, shares), 1)
    sizes = (units, each, h, w, rows, columns, shift[0], shift[1], num_heads, d**-0.5)
    size = window[0] * window[1]
    constants = {
        "H": window[0], "W": window[1], "TOKENS": max(triton.next_power_of_2(size), 16), "D": d, "CHUNK": CHUNK,
        "num_stages": 1,
    }
    return triton.cdiv(units, each), sizes, constants


@on_tensor_device
def window_attention(qkv, bias, mask, num_heads: int, window: Grid, shift: Grid):
    qkv, bias, mask = contiguous(qkv, bias, mask)
    y = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    shares, sizes, constants = _sizes(qkv, num_heads, window, shift)
    _attend[(shares * num_heads,)](
        qkv, bias, mask, y, *sizes, **constants, num_warps=FORWARD_WARPS,
        maxnreg=MOST_REGISTERS if qkv.dtype == torch.float32 else None)
    return y


@on_tensor_device
def window_attention_backward(grad_y, qkv, bias, mask, num_heads: int, window: Grid, shift: Grid):
    """Compute the gradients of qkv and bias."""
    grad_y, qkv, bias, mask = contiguous(grad_y, qkv, bias, mask)
    grad_qkv = torch.empty_like(qkv)
    shares, sizes, constants = _sizes(qkv, num_heads, window, shift)
    sums = qkv.new_empty((shares, *bias.shape), dtype=torch.float32)
    _attend_backward[(shares * num_heads,)](
        grad_y, qkv, bias, mask, grad_qkv, sums, *sizes, **constants, num_warps=BACKWARD_WARPS,
        maxnreg=None if qkv.dtype == torch.float32 else MOST_REGISTERS,
    )
    return grad_qkv, sums.sum(0).to(bias.dtype)
