"""LayerNorm fused with modulation or gate, and the gated residual sum, as Triton kernels of one pass over the tokens.

    normal = (x - mean) / deviation                       over the channels of a token
    modulated_norm    y = normal (w (1 + scale)) + (bias (1 + scale) + shift)
    gated_norm        y = (normal w + bias) SiLU(z)
    scan_gated_norm   that of a selective scan, from the outputs of its directions
    gated_sum_norm    x + gate y, and the modulated norm of that

One program processes several tokens of one image in turn, so that it loads weight and bias once. Only the inputs are
saved for the backward pass: mean and deviation are recomputed from the row, which is read anyway. The gradients of
vectors are sums over tokens: each program accumulates its own in registers, and a second pass adds the programs' sums
in a fixed order. Sums are float32 for all inputs.

    sizes: b images, l tokens of an image, c channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamamba.ops.native import unit_stride
from lamamba.ops.selective_scan import triton_kernels
from lamamba.ops.triton_utils import contiguous, num_processors, on_tensor_device, round_to

CHANNELS_PER_WARP = 512
"""16 channels per lane."""
FORWARD_WARPS, BACKWARD_WARPS = 32, 24
"""Warps that fill a multiprocessor; with more tokens, programs process more of them."""
FEWEST_TOKENS, MOST_TOKENS = 4, 64
"""Tokens of a program: with fewer, its sums cost more than its tokens; with more, the last wave is uneven."""
SUM_BLOCK = 128
SIZES = ("l", "shares", "tokens_each")
"""Arguments that no address's alignment depends on: one compilation serves all their values."""


@triton.jit
def _vector(pointer, channels, c, default: tl.constexpr):
    """A vector of the channels, or its default where the pointer is None."""
    if pointer is None:
        return tl.full((channels.shape[0],), default, tl.float32)
    else:
        return tl.load(pointer + channels, mask=channels < c, other=0.0).to(tl.float32)


@triton.jit
def _normalize(x, inside, c, eps):
    """(x - mean) / deviation, and 1 / deviation."""
    centred = tl.where(inside, x - tl.sum(x, 0) / c, 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / c + eps)
    return centred * inverse, inverse


@triton.jit(do_not_specialize=("b", *SIZES))
def _norm(
    x, parts, D, z, weight, bias, shift, scale, y,
    b, l, c, z_row, shift_row, scale_row, shares, tokens_each, eps,
    BLOCK: tl.constexpr, G: tl.constexpr,
):
    """y of a share of an image's tokens. z is None for modulated_norm; shift and scale are None for gated_norm.

    With G parts (G, b, l, c) of the G directions of a scan and D (G, c), the norm is that of sum_k parts[k] + D[k] x.
    """
    image, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    channels = tl.arange(0, BLOCK)
    inside = channels < c
    w, add = _vector(weight, channels, c, 1.0), _vector(bias, channels, c, 0.0)
    if scale is not None:
        more = 1 + _vector(scale + image.to(tl.int64) * scale_row, channels, c, 0.0)
        w, add = w * more, add * more + _vector(shift + image.to(tl.int64) * shift_row, channels, c, 0.0)
    skip = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(G):
        skip += _vector(D + k * c, channels, c, 0.0)
    first, size = image.to(tl.int64) * l, tl.cast(b, tl.int64) * l * c
    for token in range(share * tokens_each, tl.minimum((share + 1) * tokens_each, l)):
        offset = (first + token) * c + channels
        row = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        if G > 0:
            row *= skip
            for k in tl.static_range(G):
                row += tl.load(parts + k * size + offset, mask=inside, other=0.0).to(tl.float32)
        normal, _ = _normalize(row, inside, c, eps)
        result = normal * w + add
        if z is not None:
            gate = tl.load(z + (first + token) * z_row + channels, mask=inside, other=0.0).to(tl.float32)
            result *= gate * tl.sigmoid(gate)
        tl.store(y + offset, round_to(result, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _sum_norm(
    x, y, gate, weight, bias, shift, scale, total, normed,
    l, c, gate_row, shift_row, scale_row, shares, tokens_each, eps,
    BLOCK: tl.constexpr,
):
    """total = x + gate y and normed, its modulated norm, of a share of an image's tokens."""
    image, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    channels = tl.arange(0, BLOCK)
    inside = channels < c
    factor = _vector(gate + image.to(tl.int64) * gate_row, channels, c, 0.0)
    more = 1 + _vector(scale + image.to(tl.int64) * scale_row, channels, c, 0.0)
    w = _vector(weight, channels, c, 1.0) * more
    add = _vector(bias, channels, c, 0.0) * more
    add += _vector(shift + image.to(tl.int64) * shift_row, channels, c, 0.0)
    first = image.to(tl.int64) * l
    for token in range(share * tokens_each, tl.minimum((share + 1) * tokens_each, l)):
        offset = (first + token) * c + channels
        row = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        row += factor * tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
        rounded = round_to(row, total.dtype.element_ty)
        tl.store(total + offset, rounded, mask=inside)
        normal, _ = _normalize(rounded.to(tl.float32), inside, c, eps)
        tl.store(normed + offset, round_to(normal * w + add, normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _norm_backward(
    grad_y, x, z, weight, bias, scale, grad_x, grad_z, sums,
    l, c, z_row, scale_row, shares, tokens_each, eps,
    BLOCK: tl.constexpr,
):
    """Gradients of a share of an image's tokens, and its sums (b, shares, 2, c) of grad and of grad * normal.

    grad is that of normal w + bias, without modulated_norm's factor 1 + scale, which follows in _vector_gradients.
    """
    program = tl.program_id(0)
    image, share = program // shares, program % shares
    channels = tl.arange(0, BLOCK)
    inside = channels < c
    w = _vector(weight, channels, c, 1.0)
    if scale is not None:
        w *= 1 + _vector(scale + image.to(tl.int64) * scale_row, channels, c, 0.0)
    else:
        add = _vector(bias, channels, c, 0.0)
    sum_grad = tl.zeros((BLOCK,), tl.float32)
    sum_product = tl.zeros((BLOCK,), tl.float32)
    first = image.to(tl.int64) * l
    for token in range(share * tokens_each, tl.minimum((share + 1) * tokens_each, l)):
        offset = (first + token) * c + channels
        row = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
        normal, inverse = _normalize(row, inside, c, eps)
        if z is not None:
            gate = tl.load(z + (first + token) * z_row + channels, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            to_gate = grad * (normal * w + add) * (sigmoid * (1 + gate * (1 - sigmoid)))
            tl.store(grad_z + offset, round_to(to_gate, grad_z.dtype.element_ty), mask=inside)
            grad *= gate * sigmoid
        sum_grad += grad
        sum_product += grad * normal
        grad *= w
        grad -= tl.sum(grad, 0) / c + normal * (tl.sum(grad * normal, 0) / c)
        tl.store(grad_x + offset, round_to(grad * inverse, grad_x.dtype.element_ty), mask=inside)
    sums += program.to(tl.int64) * 2 * c + channels
    tl.store(sums, sum_grad, mask=inside)
    tl.store(sums + c, sum_product, mask=inside)


@triton.jit(do_not_specialize=("b", "shares"))
def _vector_gradients(
    sums, weight, bias, scale, grad_shift, grad_scale, grad_parameters,
    b, c, scale_row, shares,
    BLOCK: tl.constexpr,
):
    """Gradients of an image's shift and scale, and its summands (2, b, c) of those of bias and weight, from `sums`."""
    image = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < c
    sums += image * shares * 2 * c + channels
    sum_grad = tl.zeros((BLOCK,), tl.float32)
    sum_product = tl.zeros((BLOCK,), tl.float32)
    for share in range(shares):
        sum_grad += tl.load(sums + share * 2 * c, mask=inside, other=0.0)
        sum_product += tl.load(sums + (share * 2 + 1) * c, mask=inside, other=0.0)
    offset = image * c + channels
    to_scale = _vector(weight, channels, c, 1.0) * sum_product + _vector(bias, channels, c, 0.0) * sum_grad
    tl.store(grad_shift + offset, round_to(sum_grad, grad_shift.dtype.element_ty), mask=inside)
    tl.store(grad_scale + offset, round_to(to_scale, grad_scale.dtype.element_ty), mask=inside)
    more = 1 + _vector(scale + image * scale_row, channels, c, 0.0)
    tl.store(grad_parameters + offset, more * sum_grad, mask=inside)
    tl.store(grad_parameters + b * c + offset, more * sum_product, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _gated_sum_backward(
    grad, y, gate, grad_y, sums,
    l, c, gate_row, shares, tokens_each,
    BLOCK: tl.constexpr,
):
    """Gradient of y in x + gate y for one share of an image's tokens, and its sums (b, shares, c) of grad * y."""
    program = tl.program_id(0)
    image, share = program // shares, program % shares
    channels = tl.arange(0, BLOCK)
    inside = channels < c
    weight = _vector(gate + image.to(tl.int64) * gate_row, channels, c, 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    first = image.to(tl.int64) * l
    for token in range(share * tokens_each, tl.minimum((share + 1) * tokens_each, l)):
        offset = (first + token) * c + channels
        row = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        total += row * tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_y + offset, round_to(row * weight, grad_y.dtype.element_ty), mask=inside)
    tl.store(sums + program.to(tl.int64) * c + channels, total, mask=inside)


def _shares(x: Tensor, warps: int, warps_per_processor: int) -> tuple[int, int]:
    """Number of shares of an image's tokens and tokens per share: enough programs to fill the device, no more."""
    b, l = x.shape[0], x.shape[1] * x.shape[2]
    programs = warps_per_processor * num_processors(x) // warps
    each = min(max(b * l // programs, FEWEST_TOKENS), MOST_TOKENS)
    return triton.cdiv(l, each), each


def _block(c: int, channels_per_warp: int = CHANNELS_PER_WARP) -> tuple[int, int]:
    """BLOCK, the channels padded to a power of two, and the warps of a program."""
    block = max(triton.next_power_of_2(c), 32)
    return block, min(max(block // channels_per_warp, 1), 8)


def _row(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


@on_tensor_device
def _run(x, z, weight, bias, shift, scale, eps, parts=None, D=None) -> Tensor:
    """Any of the norms; see `_norm`."""
    x, weight, bias = contiguous(x, weight, bias)
    (b, h, w, c), (block, warps), y = x.shape, _block(x.shape[3]), torch.empty_like(x)
    shares, each = _shares(x, warps, FORWARD_WARPS)
    _norm[(b * shares,)](
        x, parts, D, z, weight, bias, shift, scale, y,
        b, h * w, c, _row(z), _row(shift), _row(scale), shares, each, eps,
        BLOCK=block, G=0 if parts is None else parts.shape[0], num_warps=warps,
    )
    return y


def _run_backward(grad_y, x, z, weight, bias, scale, eps) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x and z, and sums (b, shares, 2, c); see `_norm_backward`."""
    (b, h, w, c), (block, warps), grad_x = x.shape, _block(x.shape[3]), torch.empty_like(x)
    grad_z = None if z is None else torch.empty_like(x)
    shares, each = _shares(x, warps, BACKWARD_WARPS)
    sums = x.new_empty((b, shares, 2, c), dtype=torch.float32)
    _norm_backward[(b * shares,)](
        grad_y, x, z, weight, bias, scale, grad_x, grad_z, sums, h * w, c, _row(z), _row(scale), shares, each, eps,
        BLOCK=block, num_warps=warps,
    )
    return grad_x, grad_z, sums


def _like(grad: Tensor, parameter: Tensor | None) -> Tensor:
    return grad.new_empty(0) if parameter is None else grad.to(parameter.dtype)


def modulated_norm(x, weight, bias, shift, scale, eps):
    return _run(x, None, weight, bias, unit_stride(shift), unit_stride(scale), eps)


@on_tensor_device
def modulated_norm_backward(grad_y, x, weight, bias, shift, scale, eps):
    """Compute the gradients of x, weight, bias, shift and scale; empty ones for a weight or bias that is None."""
    grad_y, x, weight, bias = contiguous(grad_y, x, weight, bias)
    scale = unit_stride(scale)
    grad_x, _, sums = _run_backward(grad_y, x, None, weight, bias, scale, eps)
    b, shares, _, c = sums.shape
    grad_shift, grad_scale = shift.new_empty(b, c), scale.new_empty(b, c)
    parts = sums.new_empty((2, b, c))
    _vector_gradients[(b, triton.cdiv(c, SUM_BLOCK))](
        sums, weight, bias, scale, grad_shift, grad_scale, parts, b, c, scale.stride(0), shares,
        BLOCK=SUM_BLOCK, num_warps=1,
    )
    return grad_x, _like(parts[1].sum(0), weight), _like(parts[0].sum(0), bias), grad_shift, grad_scale


@on_tensor_device
def gated_sum_norm(x, y, gate, weight, bias, shift, scale, eps):
    """Compute x + gate y and its modulated norm, both in x's dtype."""
    x, y, weight, bias = contiguous(x, y, weight, bias)
    gate, shift, scale = unit_stride(gate), unit_stride(shift), unit_stride(scale)
    (b, h, w, c), (block, warps), total, normed = x.shape, _block(x.shape[3]), torch.empty_like(x), torch.empty_like(x)
    shares, each = _shares(x, warps, FORWARD_WARPS)
    _sum_norm[(b * shares,)](
        x, y, gate, weight, bias, shift, scale, total, normed,
        h * w, c, _row(gate), _row(shift), _row(scale), shares, each, eps, BLOCK=block, num_warps=warps,
    )
    return total, normed


def gated_norm(x, z, weight, bias, eps):
    return _run(x, _rows(z), weight, bias, None, None, eps)


@on_tensor_device
def scan_gated_norm(x, z, dt, B, C, W_dt, b_dt, A, D, paths, weight, bias, eps):
    """gated_norm of a selective scan, whose directions are summed as they are read."""
    x, D = contiguous(x, D)
    parts = triton_kernels.direction_outputs(x.flatten(1, 2), dt, B, C, W_dt, b_dt, A, paths)
    return _run(x, _rows(z), weight, bias, None, None, eps, parts, D)


def _rows(z: Tensor) -> Tensor:
    """(b, h, w, c) as (b h w, c): a view where rows are evenly spaced."""
    return unit_stride(z.reshape(-1, z.shape[-1]))


@on_tensor_device
def gated_norm_backward(grad_y, x, z, weight, bias, eps):
    """Compute the gradients of x, z, weight and bias."""
    grad_y, x, weight, bias = contiguous(grad_y, x, weight, bias)
    grad_x, grad_z, sums = _run_backward(grad_y, x, _rows(z), weight, bias, None, eps)
    sums = sums.flatten(0, 1)
    return grad_x, grad_z, _like(sums[:, 1].sum(0), weight), _like(sums[:, 0].sum(0), bias)


@on_tensor_device
def gated_sum_backward(grad, y, gate):
    """Compute the gradients of y and gate in x + gate y; that of x is grad itself."""
    grad, y = contiguous(grad, y)
    gate, grad_y = unit_stride(gate), torch.empty_like(y)
    (b, h, w, c), (block, warps) = y.shape, _block(y.shape[3], CHANNELS_PER_WARP // 2)         # with all, it spills
    shares, each = _shares(y, warps, BACKWARD_WARPS)
    sums = y.new_empty((b, shares, c), dtype=torch.float32)
    _gated_sum_backward[(b * shares,)](
        grad, y, gate, grad_y, sums, h * w, c, gate.stride(0), shares, each, BLOCK=block, num_warps=warps,
    )
    return grad_y, sums.sum(1).to(gate.dtype)
