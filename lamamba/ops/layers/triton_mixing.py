"""SiLU of a depthwise 3 x 3 convolution as Triton kernels that read each token once from memory.

    s[i, j] = sum over p, q of weight[p, q] x[i + p - 1, j + q - 1],    y = s sigmoid(s)

One program computes BLOCK channels of COLUMNS neighbouring columns, row by row down the grid. It holds three rows of
taps in registers, each row three times: as it is, and shifted by a column to either side (loaded from the cache).

The backward pass recomputes s and writes its gradient in x's dtype; the gradient of x is the convolution of that with
the flipped weights. The gradient of the weights is summed in registers over the rows, and over the programs in a second
pass, in a fixed order.

    sizes: b images, h and w the grid, c channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamamba.ops.native import unit_stride
from lamamba.ops.triton_utils import num_processors, on_tensor_device, round_to

COLUMNS, BLOCK, WARPS = 8, 64, 4
"""Columns and channels of a program: 4 neighbouring channels per lane."""
PROGRAMS_PER_PROCESSOR = 8
FEWEST_ROWS = 8
"""Rows of the smallest program: each reads a further row above and below."""
SIZES = ("h", "w", "strips", "rows_each")
"""Arguments that no address's alignment depends on: one compilation serves all their values."""


@triton.jit
def _taps(x, row, columns, channels, h, w, c, x_h, x_w):
    """Tokens of a row left of the columns, at them, and right of them; zeros outside the grid."""
    width = tl.where((row >= 0) & (row < h), w, 0)
    x += row * x_h + columns[:, None] * x_w + channels[None, :]
    column, inside = columns[:, None], (channels < c)[None, :]
    left = tl.load(x - x_w, mask=(column > 0) & (column <= width) & inside, other=0.0)
    here = tl.load(x, mask=(column < width) & inside, other=0.0)
    right = tl.load(x + x_w, mask=(column + 1 < width) & inside, other=0.0)
    return left, here, right


@triton.jit
def _weights(weight, channels, c, FLIPPED: tl.constexpr):
    """The nine weights of each channel in row-major order; FLIPPED, in reverse."""
    weights = ()
    for tap in tl.static_range(9):
        pointer = weight + channels * 9 + (8 - tap if FLIPPED else tap)
        weights += (tl.load(pointer, mask=channels < c, other=0.0).to(tl.float32)[None, :],)
    return weights


@triton.jit
def _weighted(left, here, right, first, second, third):
    return left.to(tl.float32) * first + here.to(tl.float32) * second + right.to(tl.float32) * third


@triton.jit
def _program_indices(h, w, c, strips, rows_each, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image, columns, channels, first row and end of its rows."""
    program = tl.program_id(0)
    blocks, stripes = tl.cdiv(c, BLOCK), tl.cdiv(w, COLUMNS)
    channels = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    columns = (program // blocks % stripes) * COLUMNS + tl.arange(0, COLUMNS)
    strip = program // blocks // stripes % strips
    image = program // blocks // stripes // strips
    return image.to(tl.int64), columns, channels, strip * rows_each, tl.minimum((strip + 1) * rows_each, h)


@triton.jit(do_not_specialize=SIZES)
def _convolve(
    x, weight, y,
    h, w, c, x_b, x_h, x_w, strips, rows_each,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):
    """y (b, h, w, c): SiLU of the convolution; BACKWARD, the convolution with flipped weights, without SiLU."""
    image, columns, channels, first, last = _program_indices(h, w, c, strips, rows_each, COLUMNS, BLOCK)
    x += image * x_b
    y += image * h * w * c
    k = _weights(weight, channels, c, BACKWARD)
    a0, a1, a2 = _taps(x, first - 1, columns, channels, h, w, c, x_h, x_w)
    b0, b1, b2 = _taps(x, first, columns, channels, h, w, c, x_h, x_w)
    inside = (columns < w)[:, None] & (channels < c)[None, :]
    for row in range(first, last):
        c0, c1, c2 = _taps(x, row + 1, columns, channels, h, w, c, x_h, x_w)
        s = _weighted(a0, a1, a2, k[0], k[1], k[2])
        s += _weighted(b0, b1, b2, k[3], k[4], k[5])
        s += _weighted(c0, c1, c2, k[6], k[7], k[8])
        if not BACKWARD:
            s *= tl.sigmoid(s)
        offset = (row * w + columns)[:, None] * c + channels[None, :]
        tl.store(y + offset, round_to(s, y.dtype.element_ty), mask=inside)
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2


@triton.jit(do_not_specialize=SIZES)
def _convolve_backward(
    x, weight, grad_y, grad_s, sums,
    h, w, c, x_b, x_h, x_w, strips, rows_each,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    """grad_s (b, h, w, c), the gradient before SiLU, and this program's summand of the weights' gradient.

    sums (shares, 9, c); a share is all channels of one image, strip of rows and stripe of columns.
    """
    image, columns, channels, first, last = _program_indices(h, w, c, strips, rows_each, COLUMNS, BLOCK)
    x += image * x_b
    grad_y += image * h * w * c
    grad_s += image * h * w * c
    k = _weights(weight, channels, c, False)
    a0, a1, a2 = _taps(x, first - 1, columns, channels, h, w, c, x_h, x_w)
    b0, b1, b2 = _taps(x, first, columns, channels, h, w, c, x_h, x_w)
    inside = (columns < w)[:, None] & (channels < c)[None, :]
    zeros = tl.zeros((COLUMNS, BLOCK), tl.float32)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for row in range(first, last):
        offset = (row * w + columns)[:, None] * c + channels[None, :]
        grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
        c0, c1, c2 = _taps(x, row + 1, columns, channels, h, w, c, x_h, x_w)
        s = _weighted(a0, a1, a2, k[0], k[1], k[2])
        s += _weighted(b0, b1, b2, k[3], k[4], k[5])
        s += _weighted(c0, c1, c2, k[6], k[7], k[8])
        sigmoid = tl.sigmoid(s)
        grad *= sigmoid * (1 + s * (1 - sigmoid))
        tl.store(grad_s + offset, round_to(grad, grad_s.dtype.element_ty), mask=inside)
        g0 += grad * a0.to(tl.float32)
        g1 += grad * a1.to(tl.float32)
        g2 += grad * a2.to(tl.float32)
        g3 += grad * b0.to(tl.float32)
        g4 += grad * b1.to(tl.float32)
        g5 += grad * b2.to(tl.float32)
        g6 += grad * c0.to(tl.float32)
        g7 += grad * c1.to(tl.float32)
        g8 += grad * c2.to(tl.float32)
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    sums += (tl.program_id(0) // tl.cdiv(c, BLOCK)).to(tl.int64) * 9 * c + channels
    totals = (g0, g1, g2, g3, g4, g5, g6, g7, g8)
    for tap in tl.static_range(9):
        tl.store(sums + tap * c, tl.sum(totals[tap], 0), mask=channels < c)


def _shares(x: Tensor) -> tuple[int, int, int]:
    """Number of shares, strips per image, rows per strip: columns are cut into strips only to fill the device."""
    b, h, w, c = x.shape
    stripes, blocks = triton.cdiv(w, COLUMNS), triton.cdiv(c, BLOCK)
    strips = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors(x), max(b * stripes * blocks, 1))
    each = max(triton.cdiv(h, strips), FEWEST_ROWS)
    strips = triton.cdiv(h, each)
    return b * stripes * strips, strips, each


def _run(x: Tensor, weight: Tensor, backward: bool) -> Tensor:
    y = x.new_empty(x.shape)
    (_, h, w, c), (shares, strips, each) = x.shape, _shares(x)
    _convolve[(shares * triton.cdiv(c, BLOCK),)](
        x, weight, y, h, w, c, *x.stride()[:3], strips, each,
        COLUMNS=COLUMNS, BLOCK=BLOCK, BACKWARD=backward, num_warps=WARPS,
    )
    return y


@on_tensor_device
def local_mixing(x, weight):
    return _run(unit_stride(x), weight.contiguous(), backward=False)


@on_tensor_device
def local_mixing_backward(grad_y, x, weight):
    """Compute the gradients of x and weight."""
    grad_y, x, weight = grad_y.contiguous(), unit_stride(x), weight.contiguous()
    grad_s = torch.empty_like(grad_y)
    (_, h, w, c), (shares, strips, each) = x.shape, _shares(x)
    sums = x.new_empty((shares, 9, c), dtype=torch.float32)
    _convolve_backward[(shares * triton.cdiv(c, BLOCK),)](
        x, weight, grad_y, grad_s, sums, h, w, c, *x.stride()[:3], strips, each,
        COLUMNS=COLUMNS, BLOCK=BLOCK, num_warps=WARPS,
    )
    grad_weight = sums.sum(0).T.reshape(weight.shape).to(weight.dtype).contiguous()
    return _run(grad_s, weight, backward=True), grad_weight
