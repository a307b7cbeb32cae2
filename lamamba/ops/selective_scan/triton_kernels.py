"""Selective scan as Triton kernels: x is gathered and y scattered through the paths, the rest stays in registers.

One program is one warp: one image, one direction, BLOCK channels (one or two per lane), TILE tokens at a time.

    time steps  s = W_dt dt_t + b_dt for a tile of tokens on the matrix units, then softplus; never written to memory
    rows        the (channels, tokens) tile is split into TILE rows, so that each lane holds whole time series of its
                channels and the recurrence is register arithmetic, one fused multiply-add deep per token
    scan        h_t = exp2(A delta2_t) h_{t-1} + delta_t B_t u_t over the rows, in float32 for all inputs
    scatter     the direction's y goes to its grid positions in x's dtype; `_merge` adds the directions in fixed order
                in float32, with the skip (sum of D) x

Time steps are kept as delta2 = delta / ln 2: softplus in base 2 is log2(1 + 2^(s / ln 2)), and exp(delta A) is then
exp2(delta2 A) without a scaling. There are no atomic additions: two runs give the same bits.

A path is cut into segments only when images x directions x channel blocks are too few to fill the device. Each segment
is first scanned from a zero state, for its final state and its sum of delta2 (`_scan`, "ends"), `_scan_segments` scans
these over the segments, and each segment is scanned again from its initial state; this loads all inputs and computes
every exponential twice.

The backward pass scans forward once and saves the state before every tile, then processes the tiles from the last to
the first, recomputing h within the tile. Gradients of B and C are summed over a block's channels in the kernel and over
the blocks afterwards; those of dt and W_dt are two matrix products with the gradient of s.

The expected cost is derived in docs/gpu-scan.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamamba.ops.triton_utils import INTERPRETED, matrix_product, num_processors, on_tensor_device, round_to

FORWARD_BLOCK = 64
BACKWARD_BLOCK = 32
"""Channels of a program: two or one per lane of its single warp."""
TILE = 8
"""Tokens in registers; with 16 a few of the kernels spill."""
MAX_STATE_SIZE = 16
RANK_STEP = 16
"""The smallest depth of a matrix instruction; the rank is padded to a multiple of it."""
MERGE_TOKENS, MERGE_BLOCK = 16, 128
"""Tokens and channels of a program of `_merge` and `_products`."""
WARPS_PER_PROCESSOR = 8
"""Programs that fill a multiprocessor; paths are cut into segments when there are far fewer."""

SIZES = ("b", "l", "segments", "tiles_per_segment")
"""Arguments that no address's alignment depends on: one compilation serves all their values."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def unsupported_reason(device_type: str, dtype: torch.dtype, state_size: int) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if state_size > MAX_STATE_SIZE:
        return f"it holds at most {MAX_STATE_SIZE} states in registers, not {state_size}"
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        return f"it needs a CUDA device (x is on {device_type}), or TRITON_INTERPRET=1"
    return None


# A "row" is the (BLOCK,) channels of one token.


@triton.jit
def _halves(tile, CHANNELS: tl.constexpr, TOKENS: tl.constexpr):
    return tl.split(tl.reshape(tile, (CHANNELS, TOKENS // 2, 2)))


@triton.jit
def _four_rows(tile, CHANNELS: tl.constexpr):
    even, odd = _halves(tile, CHANNELS, 4)
    row0, row2 = tl.split(even)
    row1, row3 = tl.split(odd)
    return row0, row1, row2, row3


@triton.jit
def _rows(tile, CHANNELS: tl.constexpr):
    """The 8 columns of a (channels, 8) tile, without a shuffle where a lane holds all tokens of its channels."""
    even, odd = _halves(tile, CHANNELS, 8)
    row0, row2, row4, row6 = _four_rows(even, CHANNELS)
    row1, row3, row5, row7 = _four_rows(odd, CHANNELS)
    return row0, row1, row2, row3, row4, row5, row6, row7


@triton.jit
def _opaque(n):
    """n, opaque to the compiler, which would keep a 64-bit address in registers for each load of a loop over n."""
    if INTERPRETED:
        return n
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [n], tl.int32, True, 1)


@triton.jit
def _channel_sums(rows, CHANNELS: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr):
    """Sum each of 8 rows over its channels: (8,).

    Unless EXACT, on the matrix units with factors of 11 bits: 80 shuffles and additions would dominate the kernel.
    """
    even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
    odd = tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7]))
    tile = tl.reshape(tl.join(even, odd), (CHANNELS, TOKENS))
    if EXACT:
        return tl.sum(tile, 0)
    else:
        copies = tl.dot(tl.full((16, CHANNELS), 1.0, tl.float32), tile, input_precision="tf32")
        return tl.sum(copies, 0) * (1 / 16)


@triton.jit
def _log2(value):
    """log2 of a value >= 1: one instruction, absolute error 2^-22 near 1; tl.log2 takes 15 instructions."""
    if INTERPRETED:
        return tl.log2(value)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, True, 1)


@triton.jit
def _exp(s):
    """exp(s) to 1 or 2 units in the last place; 2^(s / ln 2) alone loses the bits of the integer part of s / ln 2."""
    whole = tl.maximum(tl.floor(s * LOG2_E + 0.5), -200.0)
    rest = (s - whole * 0.693359375) + whole * 2.12194440e-4                    # s - whole ln 2, ln 2 in two parts
    return tl.exp2(rest * LOG2_E) * tl.exp2(whole)


@triton.jit
def _softplus2(s, EXACT: tl.constexpr):
    """softplus(s) / ln 2 = log2(1 + 2^s2) with s2 = s / ln 2; by its series where 1 + 2^s2 would lose digits."""
    s2 = s * LOG2_E
    e = _exp(s) if EXACT else tl.exp2(s2)
    series = ((e * (LOG2_E / 7) - LOG2_E / 6) * e + LOG2_E / 5) * e - LOG2_E / 4
    series = (((series * e + LOG2_E / 3) * e - LOG2_E / 2) * e + LOG2_E) * e
    delta2 = tl.where(e < 0.125, series, _log2(1 + e))
    return tl.where(s2 > 28.0, s2, delta2)


@triton.jit
def _sigmoid(delta2):
    """sigmoid(s) = 1 - exp(-delta), the derivative of delta = softplus(s); by its series where digits cancel."""
    z = delta2 * LN_2
    series = z * (1 - z * (1 / 2) * (1 - z * (1 / 3) * (1 - z * (1 / 4) * (1 - z * (1 / 5)))))
    return tl.where(delta2 < 0.25, series, 1 - tl.exp2(-delta2))


@triton.jit
def _time_steps(
    dt, W_dt, bias, paths, times, channels, g, l, c,
    R: tl.constexpr, RANK_STEP: tl.constexpr, PARTS: tl.constexpr,
):
    """delta2 = softplus(W_dt dt + b_dt) / ln 2 of a tile, (channels, tokens).

    dt and W_dt point at this image and direction; bias is a row of b_dt; W_dt is the sum of PARTS matrices in dt's
    dtype, (PARTS, g, c, r).
    """
    tokens = tl.load(paths + times, mask=times < l, other=0)
    ranks = tl.arange(0, RANK_STEP)
    s = tl.zeros((channels.shape[0], times.shape[0]), tl.float32)
    for first in tl.static_range(0, R, RANK_STEP):
        rank = first + ranks
        low = tl.load(
            dt + tokens[None, :] * (g * R) + rank[:, None], mask=(times < l)[None, :] & (rank < R)[:, None], other=0.0
        )
        for part in tl.static_range(PARTS):
            weight = tl.load(
                W_dt + part * (g * c * R) + channels[:, None] * R + rank[None, :],
                mask=(channels < c)[:, None] & (rank < R)[None, :], other=0.0,
            )
            s = matrix_product(weight, low, s)
    return _softplus2(s + bias[:, None], low.dtype == tl.float32)


@triton.jit
def _program_indices(
    c, g, segments, BLOCK: tl.constexpr,
):
    """This program's channels, direction, image and segment; neighbouring programs share their tokens."""
    program = tl.program_id(0)
    blocks = tl.cdiv(c, BLOCK)
    channels = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    k = (program // blocks) % g
    segment = (program // blocks // g) % segments
    image = program // blocks // g // segments
    return channels, k, image.to(tl.int64), segment


@triton.jit(do_not_specialize=SIZES)
def _scan(
    x, dt, B, C, W_dt, b_dt, A, paths,
    state, y, states, spans,
    b, l, c, g, segments, tiles_per_segment,
    R: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RANK_STEP: tl.constexpr,
    WRITES: tl.constexpr, ADJOINT: tl.constexpr,
):
    """Scan one segment of one path.

    state (b, g, segments, n, c) holds the initial states of the segments and is overwritten by their final ones. The n
    states are processed in turn, tile by tile, so that N costs no registers.

    WRITES    "y"       y (g, b, l, c), without the skip
              "states"  the states before every tile: states (b, g, tiles, n, c)
              "ends"    the segment's sum of delta2: spans (b, g, segments, c)
    ADJOINT   the adjoint scan, from the last token to the first: x is the gradient of y, and the state is
              exp(delta_t A) gh_t, the gradient of h_{t-1} through h_t
    """
    channels, k, image, segment = _program_indices(c, g, segments, BLOCK)
    inside = channels < c
    direction = image * g + k
    x += image * l * c + channels
    dt += image * l * g * R + k * R
    B += image * l * g * N + k * N
    C += image * l * g * N + k * N
    W_dt += k * c * R
    A += k * c * N
    paths += k * l
    y += (k.to(tl.int64) * b + image) * l * c + channels
    tiles = tl.cdiv(l, TILE)
    states += direction * tiles * N * c + channels
    offset = (direction * segments + segment) * c
    state += offset * N + channels
    bias = tl.load(b_dt + k * c + channels, mask=inside, other=0.0).to(tl.float32)
    span = tl.zeros((BLOCK,), tl.float32)

    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, tiles)
    for step in range(0, last - first):
        tile = last - 1 - step if ADJOINT else first + step
        times = tl.arange(0, TILE)
        times = tile * TILE + (TILE - 1 - times if ADJOINT else times)          # in the order of the scan
        steps = _rows(_time_steps(dt, W_dt, bias, paths, times, channels, g, l, c, R, RANK_STEP, PARTS), BLOCK)
        tokens = ()
        inputs = ()
        outputs = ()
        for i in tl.static_range(TILE):
            time = tile * TILE + (TILE - 1 - i if ADJOINT else i)
            token = tl.load(paths + time, mask=time < l, other=0)
            tokens += (token,)
            u = tl.load(x + token * c, mask=channels < tl.where(time < l, c, 0), other=0.0).to(tl.float32)
            inputs += (u if ADJOINT else steps[i] * u,)
            outputs += (tl.zeros((BLOCK,), tl.float32),)
            if WRITES == "ends":
                span += steps[i]
        for counter in range(N):
            n = _opaque(counter)
            rate = tl.load(A + channels * N + n, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(state + n * c, mask=inside, other=0.0)
            if WRITES == "states":
                tl.store(states + (tile * N + n) * c, h, mask=inside)
            more_outputs = ()
            for i in tl.static_range(TILE):
                time = tile * TILE + (TILE - 1 - i if ADJOINT else i)
                decay = tl.exp2(steps[i] * rate)
                if ADJOINT:
                    C_t = tl.load(C + (tokens[i] * (g * N) + n), mask=time < l, other=0.0).to(tl.float32)
                    h = decay * (h + inputs[i] * C_t)
                else:
                    B_t = tl.load(B + (tokens[i] * (g * N) + n), mask=time < l, other=0.0).to(tl.float32)
                    h = decay * h + inputs[i] * (B_t * LN_2)
                if WRITES == "y":
                    C_t = tl.load(C + (tokens[i] * (g * N) + n), mask=time < l, other=0.0).to(tl.float32)
                    more_outputs += (outputs[i] + C_t * h,)
            if WRITES == "y":
                outputs = more_outputs
            tl.store(state + n * c, h, mask=inside)
        tl.debug_barrier()                                                      # state is loaded again
        if WRITES == "y":
            for t in tl.static_range(TILE):
                width = tl.where(tile * TILE + t < l, c, 0)
                tl.store(y + tokens[t] * c, round_to(outputs[t], y.dtype.element_ty), mask=channels < width)
    if WRITES == "ends":
        tl.store(spans + offset + channels, span, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _scan_backward(
    x, grad_y, dt, B, C, W_dt, b_dt, A, paths,
    states, adjoint, grad_x, grad_s, grad_B, grad_C, grad_b_dt, grad_A,
    b, l, c, g, segments, tiles_per_segment,
    R: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RANK_STEP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradients along one segment of one path, from its last token to its first.

        gh_t = C_t gy_t + exp(delta_{t+1} A) gh_{t+1}

    states (b, g, tiles, n, c) are those of `_scan`. adjoint (b, g, segments, n, c) holds exp(delta_{t+1} A) gh_{t+1} at
    each segment's last token t, and is overwritten. Results, in grid order for each direction: grad_x (g, b, l, c)
    without the skip, grad_s (g, b, l, c), and each channel block's summand of grad_B and grad_C (blocks, b, l, g, n);
    each segment's summand of grad_b_dt (b, g, segments, c), and of grad_A / ln 2 (b, g, segments, n, c), which must be
    zeros at first.
    """
    channels, k, image, segment = _program_indices(c, g, segments, BLOCK)
    inside = channels < c
    direction = image * g + k
    x += image * l * c + channels
    grad_y += image * l * c + channels
    dt += image * l * g * R + k * R
    B += image * l * g * N + k * N
    C += image * l * g * N + k * N
    W_dt += k * c * R
    A += k * c * N
    paths += k * l
    grad_x += (k.to(tl.int64) * b + image) * l * c + channels
    grad_s += (k.to(tl.int64) * b + image) * l * c + channels
    block = tl.program_id(0) % tl.cdiv(c, BLOCK)
    shares = (block.to(tl.int64) * b + image) * l * g * N + k * N
    grad_B += shares
    grad_C += shares
    tiles = tl.cdiv(l, TILE)
    states += direction * tiles * N * c
    offset = (direction * segments + segment) * c
    bias = tl.load(b_dt + k * c + channels, mask=inside, other=0.0).to(tl.float32)

    adjoint += offset * N + channels
    grad_A += offset * N + channels
    bias_sum = tl.zeros((BLOCK,), tl.float32)

    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, tiles)
    for step in range(0, last - first):
        tile = last - 1 - step
        times = tile * TILE + tl.arange(0, TILE)
        tile_tokens = tl.load(paths + times, mask=times < l, other=0)
        steps = _rows(_time_steps(dt, W_dt, bias, paths, times, channels, g, l, c, R, RANK_STEP, PARTS), BLOCK)
        tokens = ()
        inputs = ()
        grads = ()
        through_inputs = ()                                                     # sum over n of gh_t B_t
        through_decays = ()                                                     # sum over n of gh_t exp(delta_t A) h A
        for t in tl.static_range(TILE):
            time = tile * TILE + t
            token = tl.load(paths + time, mask=time < l, other=0)
            tokens += (token,)
            inputs += (tl.load(x + token * c, mask=channels < tl.where(time < l, c, 0), other=0.0).to(tl.float32),)
            grads += (tl.load(grad_y + token * c, mask=channels < tl.where(time < l, c, 0), other=0.0).to(tl.float32),)
            through_inputs += (tl.zeros((BLOCK,), tl.float32),)
            through_decays += (tl.zeros((BLOCK,), tl.float32),)

        for counter in range(N):
            n = _opaque(counter)
            rate = tl.load(A + channels * N + n, mask=inside, other=0.0).to(tl.float32)
            h = (tl.load(states + (tile * N + n) * c + channels, mask=inside, other=0.0),)
            decays = ()
            B_values = ()
            C_rows = ()
            for t in tl.static_range(TILE):
                B_t = tl.load(B + (tokens[t] * (g * N) + n), mask=tile * TILE + t < l, other=0.0).to(tl.float32)
                B_values += (B_t,)
                decays += (tl.exp2(steps[t] * rate),)
                h += (decays[t] * h[t] + (steps[t] * inputs[t]) * (B_t * LN_2),)
                C_rows += (grads[t] * h[t + 1],)

            map_offsets = tile_tokens * (g * N) + n
            tl.store(grad_C + map_offsets, _channel_sums(C_rows, BLOCK, TILE, EXACT), mask=times < l)

            gh = tl.load(adjoint + n * c, mask=inside, other=0.0)
            rate_sum = tl.load(grad_A + n * c, mask=inside, other=0.0)
            B_rows = ()                                                           # from the last token
            more_inputs = ()
            more_decays = ()
            for t in tl.static_range(TILE - 1, -1, -1):
                C_t = tl.load(C + (tokens[t] * (g * N) + n), mask=tile * TILE + t < l, other=0.0).to(tl.float32)
                gh += grads[t] * C_t
                B_rows = (gh * (steps[t] * inputs[t]),) + B_rows  # noqa: RUF005 (Triton knows no stars)
                more_inputs = (through_inputs[t] + gh * B_values[t],) + more_inputs  # noqa: RUF005
                gh *= decays[t]
                through_decay = gh * h[t]
                more_decays = (through_decays[t] + through_decay * rate,) + more_decays  # noqa: RUF005
                rate_sum += through_decay * steps[t]
            through_inputs = more_inputs
            through_decays = more_decays
            tl.store(adjoint + n * c, gh, mask=inside)
            tl.store(grad_A + n * c, rate_sum, mask=inside)
            tl.store(grad_B + map_offsets, _channel_sums(B_rows, BLOCK, TILE, EXACT) * LN_2, mask=times < l)
        tl.debug_barrier()                                                      # adjoint and grad_A are loaded again

        for t in tl.static_range(TILE):
            time = tile * TILE + t
            gs = (through_inputs[t] * inputs[t] + through_decays[t]) * _sigmoid(steps[t])
            bias_sum += gs
            gu = through_inputs[t] * (steps[t] * LN_2)
            width = tl.where(time < l, c, 0)
            tl.store(grad_x + tokens[t] * c, round_to(gu, grad_x.dtype.element_ty), mask=channels < width)
            tl.store(grad_s + tokens[t] * c, round_to(gs, grad_s.dtype.element_ty), mask=channels < width)

    tl.store(grad_b_dt + offset + channels, bias_sum, mask=inside)


@triton.jit(do_not_specialize=("l", "segments"))
def _scan_segments(
    A, ends, spans, starts,
    l, c, g, segments,
    N: tl.constexpr, BLOCK: tl.constexpr, ADJOINT: tl.constexpr,
):
    """Scan over segments: starts, the initial states, from ends, the final states without them; ADJOINT in reverse."""
    channels, k, image, _ = _program_indices(c, g, 1, BLOCK)
    inside = channels < c
    offset = (image * g + k) * segments * c
    for n in tl.static_range(N):
        rate = tl.load(A + (k * c + channels) * N + n, mask=inside, other=0.0).to(tl.float32)
        start = tl.zeros((BLOCK,), tl.float32)
        for step in range(segments):
            segment = segments - 1 - step if ADJOINT else step
            here = offset + segment * c
            tl.store(starts + here * N + n * c + channels, start, mask=inside)
            span = tl.load(spans + here + channels, mask=inside, other=0.0)
            end = tl.load(ends + here * N + n * c + channels, mask=inside, other=0.0)
            start = end + tl.exp2(span * rate) * start


@triton.jit(do_not_specialize=("tokens",))
def _merge(
    parts, skipped, skip, y,
    tokens, c, g,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):
    """y = sum over k of parts[k] + skip * skipped, for parts (g, tokens, c), skip (c,), the others (tokens, c)."""
    blocks = tl.cdiv(c, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < tokens)[:, None] & (channels < c)[None, :]
    offset = rows[:, None] * c + channels[None, :]
    weight = tl.load(skip + channels, mask=channels < c, other=0.0)
    total = weight[None, :] * tl.load(skipped + offset, mask=inside, other=0.0).to(tl.float32)
    size = tl.cast(tokens, tl.int64) * c
    for k in range(g):
        total += tl.load(parts + offset + k * size, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offset, round_to(total, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("tokens", "tokens_per_program"))
def _products(
    x, grad_y, sums,
    tokens, c, tokens_per_program,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):
    """sums[i] = the sum of x * grad_y over the i-th share of the tokens, for x and grad_y (tokens, c)."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, tokens)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        inside = (rows < last)[:, None] & (channels < c)[None, :]
        offset = rows[:, None] * c + channels[None, :]
        product = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        product *= tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(product, 0)
    tl.store(sums + tl.program_id(1) * c + channels, total, mask=channels < c)


def _kernel_arguments(x, dt, B, C, W_dt, b_dt, A, paths):
    """Input arguments of the scan kernels: contiguous, W_dt in parts (parts, g, c, r) of dt's dtype, 32-bit paths."""
    tensors = (x, dt, B, C, _in_parts(W_dt, dt.dtype), b_dt, A, paths.to(torch.int32))
    return tuple(tensor.contiguous() for tensor in tensors)


def _in_parts(W_dt: Tensor, dtype: torch.dtype) -> Tensor:
    """W_dt as a sum of matrices in dt's dtype: three 16-bit numbers represent a float32 one exactly."""
    if W_dt.dim() == 4:                                                         # prepared
        return W_dt
    parts, rest = [], W_dt
    for _ in range(1 if dtype in (W_dt.dtype, torch.float32) else 3):
        parts.append(rest.to(dtype))
        rest = rest.float() - parts[-1].float()
    return torch.stack(parts)


def _options(inputs, block: int, tile: int) -> dict:
    _, dt, _, _, W_dt, _, A, _ = inputs
    return {
        "R": dt.shape[3], "N": A.shape[2], "PARTS": W_dt.shape[0], "BLOCK": block, "TILE": tile,
        "RANK_STEP": RANK_STEP, "num_warps": 1,
    }


def _choose_segments(x: Tensor, directions: int, tile: int) -> int:
    """1, or the number of segments that fills the device where whole paths would fill less than a third of it."""
    b, l, c = x.shape
    if x.device.type != "cuda" or b == 0:
        return 1
    programs = b * directions * triton.cdiv(c, FORWARD_BLOCK)
    wanted = WARPS_PER_PROCESSOR * num_processors(x)
    return 1 if 3 * programs > wanted else min(triton.cdiv(wanted, programs), triton.cdiv(l, 4 * tile))


def _cut(length: int, tile: int, segments: int) -> tuple[int, int]:
    """Number of non-empty segments, and tiles per segment."""
    tiles = triton.cdiv(length, tile)
    each = triton.cdiv(tiles, segments)
    return triton.cdiv(tiles, each), each


def _initial_states(inputs, sizes, options, adjoint: bool) -> Tensor:
    """Initial states of the segments in the direction of the scan: (b, g, segments, n, c)."""
    A = inputs[6]
    b, l, c, g, segments, _ = sizes
    ends = torch.zeros((b, g, segments, A.shape[2], c), dtype=torch.float32, device=A.device)
    if segments == 1:
        return ends
    starts, spans = torch.empty_like(ends), ends.new_empty((b, g, segments, c))
    blocks = triton.cdiv(c, FORWARD_BLOCK)
    _scan[(blocks * b * g * segments,)](
        *inputs, ends, ends, ends, spans, *sizes, **options, WRITES="ends", ADJOINT=adjoint,
    )
    _scan_segments[(blocks * b * g,)](
        A, ends, spans, starts, l, c, g, segments, N=A.shape[2], BLOCK=FORWARD_BLOCK, ADJOINT=adjoint, num_warps=1,
    )
    return starts


def _merge_directions(parts: Tensor, skipped: Tensor, skip: Tensor) -> Tensor:
    """Sum over g of parts (g, b, l, c), plus skip (c,) * skipped (b, l, c), in float32."""
    y = torch.empty_like(skipped)
    tokens, c = skipped.shape[0] * skipped.shape[1], skipped.shape[2]
    grid = (triton.cdiv(c, MERGE_BLOCK) * triton.cdiv(tokens, MERGE_TOKENS),)
    _merge[grid](parts, skipped, skip, y, tokens, c, parts.shape[0], TOKENS=MERGE_TOKENS, BLOCK=MERGE_BLOCK)
    return y


def _sum_of_products(x: Tensor, grad_y: Tensor) -> Tensor:
    """Sum of x * grad_y over images and tokens: (c,), float32."""
    tokens, c = x.shape[0] * x.shape[1], x.shape[2]
    each = max(MERGE_TOKENS, triton.cdiv(tokens, 256))
    shares = triton.cdiv(tokens, each)
    sums = x.new_empty((shares, c), dtype=torch.float32)
    _products[(triton.cdiv(c, MERGE_BLOCK), shares)](
        x, grad_y, sums, tokens, c, each, TOKENS=MERGE_TOKENS, BLOCK=MERGE_BLOCK,
    )
    return sums.sum(0)


def prepare(W_dt, A, D, paths, dtype):
    """W_dt, A, D and paths as the kernels read them, for dt of this dtype: `forward` takes them, too."""
    return _in_parts(W_dt, dtype), A.float().contiguous(), D.float().sum(0), paths.to(torch.int32).contiguous()


@on_tensor_device
def forward(x, dt, B, C, W_dt, b_dt, A, D, paths, segments: int | None = None):
    """As in the reference. segments: of each path; by default as many as fill the device."""
    (b, l, c), g = x.shape, A.shape[0]
    tile = TILE
    inputs = _kernel_arguments(x, dt, B, C, W_dt, b_dt, A, paths)
    x, A = inputs[0], inputs[6]
    segments, each = _cut(l, tile, segments or _choose_segments(x, g, tile))
    sizes, options = (b, l, c, g, segments, each), _options(inputs, FORWARD_BLOCK, tile)
    state = _initial_states(inputs, sizes, options, adjoint=False)
    parts = x.new_empty((g, b, l, c))
    _scan[(triton.cdiv(c, FORWARD_BLOCK) * b * g * segments,)](
        *inputs, state, parts, state, state, *sizes, **options, WRITES="y", ADJOINT=False,
    )
    return _merge_directions(parts, x, D if D.dim() == 1 else D.float().sum(0))


@on_tensor_device
def backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths, segments: int | None = None):
    """As in the reference. segments: as in `forward`."""
    dtypes = [tensor.dtype for tensor in (x, dt, B, C, W_dt, b_dt, A, D)]
    (b, l, c), (g, _, n) = x.shape, A.shape
    tile = TILE
    blocks, tiles = triton.cdiv(c, BACKWARD_BLOCK), triton.cdiv(l, tile)
    inputs = _kernel_arguments(x, dt, B, C, W_dt, b_dt, A, paths)
    x, dt, _, _, _, _, A, _ = inputs
    grad_y = grad_y.contiguous()
    segments, each = _cut(l, tile, segments or _choose_segments(x, g, tile))
    sizes, options = (b, l, c, g, segments, each), _options(inputs, FORWARD_BLOCK, tile)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    state = _initial_states(inputs, sizes, options, adjoint=False)
    adjoint = _initial_states((grad_y, *inputs[1:]), sizes, options, adjoint=True)
    states = empty(b, g, tiles, n, c)
    _scan[(triton.cdiv(c, FORWARD_BLOCK) * b * g * segments,)](
        *inputs, state, states, states, state, *sizes, **options, WRITES="states", ADJOINT=False,
    )
    parts, gs = x.new_empty((g, b, l, c)), x.new_empty((g, b, l, c))
    gB, gC = empty(blocks, b, l, g, n), empty(blocks, b, l, g, n)
    gb_dt, gA = empty(b, g, segments, c), empty(b, g, segments, n, c).zero_()
    _scan_backward[(blocks * b * g * segments,)](
        x, grad_y, *inputs[1:], states, adjoint, parts, gs, gB, gC, gb_dt, gA, *sizes,
        **_options(inputs, BACKWARD_BLOCK, tile), EXACT=x.dtype == torch.float32, num_stages=1,
    )
    gdt, gW_dt = _projection_gradients(gs.view(g, b * l, c), dt.view(b * l, g, dt.shape[3]).transpose(0, 1), W_dt)
    gx = _merge_directions(parts, grad_y, D.float().sum(0))
    grads = (
        gx, gdt.transpose(0, 1).reshape(dt.shape), gB.sum(0), gC.sum(0), gW_dt, gb_dt.sum((0, 2)),
        LN_2.value * gA.sum((0, 2)).mT, _sum_of_products(x, grad_y).expand(g, c),
    )
    return tuple(grad.to(dtype).contiguous() for grad, dtype in zip(grads, dtypes, strict=True))


def _projection_gradients(gs: Tensor, dt: Tensor, W_dt: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of dt (g, b l, r) and W_dt (g, c, r) from gs (g, b l, c), those of s = W_dt dt."""
    if gs.device.type == "cuda" and gs.dtype == dt.dtype != torch.float32:
        gW_dt = torch.bmm(gs.mT, dt, out_dtype=torch.float32)
    else:
        gW_dt = gs.float().mT @ dt.float()
    return gs @ W_dt.to(gs.dtype), gW_dt
