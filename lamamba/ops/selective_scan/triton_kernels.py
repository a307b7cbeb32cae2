"""Selective scan as Triton kernels: x is gathered and y scattered through the paths, the rest stays in registers.

One program is one warp: one image, one direction, BLOCK channels (one or two per lane), TILE tokens at a time.

    arrange     dt, B and C are copied into the order of the paths, weights into that of the matrix units (`_arrange`)
    time steps  s = W_dt dt_t + b_dt for a tile of tokens on the matrix units; never written to memory
    rows        the (channels, tokens) tile is split into TILE rows, so that each lane holds whole time series of its
                channels, and softplus and the recurrence are register arithmetic
    scan        h_t = exp2(A delta2_t) h_{t-1} + delta_t B_t u_t over the rows, in float32 for all inputs
    scatter     the direction's y goes to its grid positions in x's dtype; `_merge` adds the directions in fixed order
                in float32, with the skip (sum of D) x

Time steps are kept as delta2 = delta / ln 2: softplus in base 2 is log2(1 + 2^(s / ln 2)), and exp(delta A) is then
exp2(delta2 A) without a scaling; ln 2 is multiplied into B. There are no atomic additions: two runs give the same bits.

A path is cut into segments only when images x directions x channel blocks are too few to fill the device. Each segment
is first scanned from a zero state, for its final state and its sum of delta2 (`_scan`, "ends"), `_scan_segments` scans
these over the segments, and each segment is scanned again from its initial state; this loads all inputs and computes
every exponential twice.

The backward pass scans forward once and saves the state before every tile, then processes the tiles from the last to
the first, recomputing h within the tile. Gradients of B and C are summed over a block's channels in the kernel and over
the blocks afterwards (`_restore`); those of dt and W_dt are two matrix products with the gradient of s.

The expected cost is derived in docs/gpu-scan.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamamba.ops.native import unit_stride
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
ARRANGED_TOKENS = 64
"""Tokens of a program of `_arrange` and `_restore`."""
KEPT_RANK = 64
"""Weights of a channel, all parts together, that a program can keep in registers."""
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
def _load(pointer, inside):
    """Load as float32; inside is a mask, or None for everything."""
    if inside is None:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _four(pointer):
    """Four adjacent float32 or int32 numbers, the same for all lanes, by one instruction."""
    if INTERPRETED:
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)
    elif pointer.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [pointer.to(tl.int64)],
            (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointer.to(tl.int64)],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )


@triton.jit
def _eight(pointer):
    return _four(pointer) + _four(pointer + 4)


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
    """n, opaque to the compiler, which would keep a 64-bit address in registers for each load of a loop over n, or
    what does not depend on n itself."""
    if INTERPRETED:
        return n
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [n], tl.int32, True, 1)


@triton.jit
def _tile(rows):
    """The (channels, 8) tile whose columns are 8 rows: the inverse of `_rows`."""
    even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
    odd = tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7]))
    return tl.reshape(tl.join(even, odd), (rows[0].shape[0], 8))


@triton.jit
def _channel_sums(first, second, CHANNELS: tl.constexpr, EXACT: tl.constexpr):
    """Sums over the channels of each of 8 rows and 8 more: (16,).

    Unless EXACT, on the matrix units with factors of 11 bits: D[i, j] = sum of the i-th row over the j-th eighth of the
    channels, a product with zeros and ones in which every number already lies in the lane that needs it.
    """
    LOW: tl.constexpr = CHANNELS // 8
    tile = tl.join(_tile(first), _tile(second))                                 # (channels, 8, 2)
    if EXACT:
        return tl.reshape(tl.permute(tl.sum(tile, 0), (1, 0)), (16,))
    else:
        tile = tl.permute(tl.reshape(tile, (8, 4, LOW // 4, 8, 2)), (4, 3, 2, 1, 0))
        tile = tl.reshape(tile, (16 * LOW, 8))
        ones = tl.arange(0, 16)[:, None] == tl.arange(0, 16 * LOW)[None, :] // LOW
        return tl.sum(tl.dot(ones.to(tl.float32), tile, input_precision="tf32"), 1)


@triton.jit
def _exp(s):
    """exp(s) to 1 or 2 units in the last place; 2^(s / ln 2) alone loses the bits of the integer part of s / ln 2."""
    whole = tl.maximum(tl.floor(s * LOG2_E + 0.5), -200.0)
    rest = (s - whole * 0.693359375) + whole * 2.12194440e-4                    # s - whole ln 2, ln 2 in two parts
    return tl.exp2(rest * LOG2_E) * tl.exp2(whole)


@triton.jit
def _decaying_exp2(s2):
    """2^(-|s2|) by one instruction; the compiler computes tl.abs by another one."""
    if INTERPRETED:
        return tl.exp2(-tl.abs(s2))
    else:
        return tl.inline_asm_elementwise(
            "{.reg .f32 t; abs.f32 t, $1; neg.f32 t, t; ex2.approx.ftz.f32 $0, t;}", "=f,f", [s2], tl.float32, True, 1)


@triton.jit
def _softplus2(s, EXACT: tl.constexpr):
    """softplus(s) / ln 2 = max(s / ln 2, 0) + log2(1 + e) with e = exp(-|s|); of s if EXACT, else of s2 = s / ln 2.

    log2(1 + e) is e times a polynomial of least relative error on [0, 1]: 2e-7, or 3e-8 if EXACT.
    """
    s2 = s * LOG2_E if EXACT else s
    if EXACT:
        e = _exp(-tl.abs(s))
        p = 0.007549182046204805 * e - 0.04256706312298775
        p = (p * e + 0.1128561943769455) * e - 0.19711896777153015
        p = (p * e + 0.27564141154289246) * e - 0.35840848088264465
        p = (p * e + 0.48069295287132263) * e - 0.7213401794433594
        p = p * e + 1.4426950216293335
    else:
        e = _decaying_exp2(s2)
        p = -0.012319473549723625 * e + 0.06360789388418198
        p = (p * e - 0.15535187721252441) * e + 0.2560097277164459
        p = (p * e - 0.35339483618736267) * e + 0.48006370663642883
        p = (p * e - 0.7213100790977478) * e + 1.4426947832107544
    return p * e + tl.maximum(s2, 0.0)


@triton.jit
def _reciprocal(value):
    if INTERPRETED:
        return 1 / value
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, True, 1)


@triton.jit
def _slope2(s, EXACT: tl.constexpr):
    """sigmoid(s) / ln 2, the derivative of softplus(s) / ln 2; of s or s2 as in _softplus2."""
    e = _exp(-tl.abs(s)) if EXACT else _decaying_exp2(s)                        # as there
    inverse = 1 / (e * LN_2 + LN_2) if EXACT else _reciprocal(e * LN_2 + LN_2)
    return tl.where(s < 0, e * inverse, inverse)


@triton.jit
def _weights_of_program(W, c, g, k, BLOCK: tl.constexpr, K: tl.constexpr):
    """Pointer to the weights of this program's channels, and the size of a part of W; see `_arrange`."""
    chunks = tl.cdiv(c, 64) * 4
    block = tl.program_id(0) % tl.cdiv(c, BLOCK)
    return W + (k * chunks + block * (BLOCK // 16)) * (16 * K), g * chunks * (16 * K)


@triton.jit
def _weights(W, part_size, BLOCK: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr):
    """The (BLOCK, STEP) matrices of `_arrange`, already in the registers where the matrix units want them."""
    tiles = tl.arange(0, BLOCK // 16)[:, None] * (16 * K) + tl.arange(0, 16 * STEP)[None, :]
    weights = ()
    for part in tl.static_range(PARTS):
        for first in tl.static_range(0, K, STEP):
            weight = tl.load(W + part * part_size + first * 16 + tiles)
            weight = tl.permute(tl.reshape(weight, (BLOCK // 16, 8, 4, 2, 2, 2)), (0, 4, 1, 3, 2, 5))
            weights += (tl.reshape(weight, (BLOCK, STEP)),)
    return weights


@triton.jit
def _projections(
    rows, weights,
    BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """s = W_dt dt + b_dt of a tile as TILE rows, or s / ln 2 for 16-bit tokens. `rows` points at the first token's."""
    times = tl.arange(0, TILE)
    times = TILE - 1 - times if REVERSED else times
    tile = times[:, None] * K + tl.arange(0, STEP)[None, :]
    s = tl.zeros((BLOCK, TILE), tl.float32)
    for step in tl.static_range(K // STEP):
        low = tl.load(rows + step * STEP + tile)
        low = tl.permute(tl.reshape(low, (TILE, 4, 2, 2)), (0, 2, 1, 3))        # the order of ranks in `_weights`
        low = tl.trans(tl.reshape(low, (TILE, STEP)))
        for part in tl.static_range(PARTS):
            s = matrix_product(weights[part * (K // STEP) + step], low, s)
    return _rows(s if low.dtype == tl.float32 else s * LOG2_E, BLOCK)


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


@triton.jit
def _arrange_weights(
    W_dt, b_dt, W,
    program, c, g, chunks,
    R: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
):
    """[W_dt | b_dt | 0] of 16 channels of one direction; see `_arrange`."""
    k = program // chunks
    rows = tl.arange(0, 16)
    columns = tl.arange(0, STEP)
    channels = program % chunks * 16 + rows
    inside = channels < c
    bias = tl.load(b_dt + k * c + channels, mask=inside, other=0.0).to(tl.float32)
    place = (rows % 8 * 32 + rows // 8 * 2)[:, None] + (columns // 4 * 8 + columns // 2 % 2 * 4 + columns % 2)[None, :]
    for first in tl.static_range(0, K, STEP):
        rank = first + columns
        place_in_W_dt = (k * c + channels)[:, None] * R + rank[None, :]
        rest = tl.load(W_dt + place_in_W_dt, mask=inside[:, None] & (rank < R)[None, :], other=0.0).to(tl.float32)
        rest = tl.where((rank == R)[None, :], bias[:, None], rest)
        for part in tl.static_range(PARTS):
            rounded = round_to(rest, W.dtype.element_ty)
            tl.store(W + (part * g * chunks + program) * (16 * K) + first * 16 + place, rounded)
            value = rounded.to(tl.float32)
            rest = tl.where(value == rest, 0.0, rest - value)                   # infinity leaves no rest


@triton.jit(do_not_specialize=("b", "l", "tiles", "programs"))
def _arrange(
    dt, B, C, W_dt, b_dt, paths,
    rows, maps, W, offsets,
    dt_token, dt_direction, B_token, B_direction, C_token, C_direction,
    b, l, c, g, tiles, programs, chunks,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    TILE: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr,
):
    """What the scans read, in the order in which they do.

    rows     (b, g, tiles TILE, K)          dt along the paths, then a one, then zeros
    maps     (b, g, tiles, n, 2, TILE)      ln 2 B and C along the paths, in float32; zeros beyond the end
    offsets  (g, tiles TILE)                paths times c / UNIT, in 32 bits; the last token again beyond the end
    W        (PARTS, g, chunks, K / 16, 8, 4, 2, 2, 2)   [W_dt | b_dt | 0], for 16 channels the register contents of a
             matrix instruction's 32 lanes; the sum of PARTS 16-bit matrices represents a float32 one exactly
    """
    program = tl.program_id(0)
    if program >= programs:
        _arrange_weights(W_dt, b_dt, W, program - programs, c, g, chunks, R, K, PARTS, STEP)
    else:
        k = program % g
        blocks = tl.cdiv(tiles * TILE, TOKENS)
        image = program // g // blocks
        times = program // g % blocks * TOKENS + tl.arange(0, TOKENS)
        inside, exists = times < l, times < tiles * TILE
        path = tl.load(paths + k * l + tl.minimum(times, l - 1))
        if image == 0:
            tl.store(offsets + k * tiles * TILE + times, (path * (c // UNIT)).to(tl.int32), mask=exists)
        direction = image.to(tl.int64) * g + k
        tokens = image.to(tl.int64) * l + path
        for first in tl.static_range(0, K, STEP):
            rank = first + tl.arange(0, STEP)
            low = tl.load(
                dt + (tokens * dt_token + k * dt_direction)[:, None] + rank[None, :],
                mask=inside[:, None] & (rank < R)[None, :], other=0.0,
            )
            low = tl.where((rank == R)[None, :], 1.0, low.to(tl.float32)).to(rows.dtype.element_ty)
            tl.store(
                rows + (direction * tiles * TILE + times)[:, None] * K + rank[None, :], low, mask=exists[:, None])
        places = maps + (direction * tiles + times // TILE) * (N * 2 * TILE) + times % TILE
        for n in range(N):
            B_n = tl.load(B + tokens * B_token + k * B_direction + n, mask=inside, other=0.0).to(tl.float32)
            C_n = tl.load(C + tokens * C_token + k * C_direction + n, mask=inside, other=0.0).to(tl.float32)
            tl.store(places + n * 2 * TILE, B_n * LN_2, mask=exists)
            tl.store(places + n * 2 * TILE + TILE, C_n, mask=exists)


@triton.jit
def _store_row(pointer, row, channels, c, exists, ALL_CHANNELS: tl.constexpr, ALL_TOKENS: tl.constexpr):
    value = round_to(row, pointer.dtype.element_ty)
    if not ALL_TOKENS:
        tl.store(pointer, value, mask=channels < tl.where(exists, c, 0))
    elif not ALL_CHANNELS:
        tl.store(pointer, value, mask=channels < c)
    else:
        tl.store(pointer, value)


@triton.jit(do_not_specialize=SIZES)
def _scan(
    x, rows, maps, W, offsets, A,
    state, y, states, spans,
    b, l, c, g, segments, tiles_per_segment,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, ALL_CHANNELS: tl.constexpr, ALL_TOKENS: tl.constexpr,
    KEEP: tl.constexpr, WRITES: tl.constexpr, ADJOINT: tl.constexpr,
):
    """Scan one segment of one path. rows, maps, W and offsets as in `_arrange`, A (g, n, c).

    state (b, g, segments, n, c) holds the initial states of the segments, or is None for zeros. One state stays in
    registers; several are processed in turn, tile by tile, so that N costs no registers, and overwrite `state`.
    KEEP holds the weights in registers, too.

    WRITES    "y"       y (g, b, l, c), without the skip
              "states"  the states before every tile: states (b, g, tiles, n, c)
              "ends"    the final states: state; the segment's sum of delta2: spans (b, g, segments, c)
    ADJOINT   the adjoint scan, from the last token to the first: x is the gradient of y, and the state is
              exp(delta_t A) gh_t, the gradient of h_{t-1} through h_t
    """
    channels, k, image, segment = _program_indices(c, g, segments, BLOCK)
    inside = None if ALL_CHANNELS else channels < c
    direction = image * g + k
    tiles = tl.cdiv(l, TILE)
    x += image * l * c + channels
    y += (k.to(tl.int64) * b + image) * l * c + channels
    rows += direction * tiles * TILE * K
    maps += direction * tiles * N * 2 * TILE
    offsets += k * tiles * TILE
    A += k * N * c + channels
    states += direction * tiles * N * c + channels
    span_offset = (direction * segments + segment) * c + channels
    W, part_size = _weights_of_program(W, c, g, k, BLOCK, K)
    if KEEP:
        weights = _weights(W, part_size, BLOCK, STEP, K, PARTS)
    span = tl.zeros((BLOCK,), tl.float32)
    h = tl.zeros((BLOCK,), tl.float32)
    rate = _load(A, inside)
    if state is not None:
        state += (direction * segments + segment) * c * N + channels
        h = _load(state, inside)

    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, tiles)
    for step in range(0, last - first):
        tile = last - 1 - step if ADJOINT else first + step
        if not KEEP:
            # without a store in the loop the compiler would load them all before it
            zero = (_opaque(tile) - tile) * 16 if WRITES == "ends" else 0
            weights = _weights(W + zero, part_size, BLOCK, STEP, K, PARTS)
        s = _projections(rows + tile * TILE * K, weights, BLOCK, TILE, STEP, K, PARTS, ADJOINT)
        tokens = _eight(offsets + tile * TILE)
        steps = ()
        inputs = ()
        outputs = ()
        for i in tl.static_range(TILE):
            steps += (_softplus2(s[i], rows.dtype.element_ty == tl.float32),)
            u = _load(x + tokens[TILE - 1 - i if ADJOINT else i] * UNIT, inside)
            inputs += (u if ADJOINT else steps[i] * u,)
            outputs += (tl.zeros((BLOCK,), tl.float32),)
            if WRITES == "ends":
                span += steps[i]
        for counter in range(N):
            n = counter
            if N > 1:
                n = _opaque(counter)
                rate = _load(A + n * c, inside)
                h = _load(state + n * c, inside)
            if WRITES == "states":
                tl.store(states + (tile * N + n) * c, h, mask=inside)
            place = maps + (tile * N + n) * 2 * TILE
            if ADJOINT:
                C_values = _eight(place + TILE)
                for i in tl.static_range(TILE):
                    h = tl.exp2(steps[i] * rate) * (h + inputs[i] * C_values[TILE - 1 - i])
            else:
                B_values = _eight(place)
                if WRITES == "y":
                    C_values = _eight(place + TILE)
                more_outputs = ()
                for i in tl.static_range(TILE):
                    h = tl.exp2(steps[i] * rate) * h + inputs[i] * B_values[i]
                    if WRITES == "y":
                        more_outputs += (outputs[i] + C_values[i] * h,)
                if WRITES == "y":
                    outputs = more_outputs
            if N > 1:
                tl.store(state + n * c, h, mask=inside)
        if N > 1:
            tl.debug_barrier()                                                  # state is loaded again
        if WRITES == "y":
            for i in tl.static_range(TILE):
                _store_row(y + tokens[i] * UNIT, outputs[i], channels, c, tile * TILE + i < l, ALL_CHANNELS, ALL_TOKENS)
    if WRITES == "ends":
        tl.store(spans + span_offset, span, mask=inside)
        if N == 1:
            tl.store(state, h, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _scan_backward(
    x, grad_y, rows, maps, W, offsets, A,
    states, adjoint, grad_x, grad_s, grad_maps, grad_b_dt, grad_A,
    b, l, c, g, segments, tiles_per_segment,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, ALL_CHANNELS: tl.constexpr, ALL_TOKENS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Gradients along one segment of one path, from its last token to its first.

        gh_t = C_t gy_t + exp(delta_{t+1} A) gh_{t+1}

    Inputs as in `_scan`; states (b, g, tiles, n, c) are those of `_scan`. adjoint (b, g, segments, n, c) holds
    exp(delta_{t+1} A) gh_{t+1} at each segment's last token t, or is None for zeros; it is overwritten. Results:

        grad_x, grad_s (g, b, l, c)     of each direction, in grid order, grad_x without the skip
        grad_maps (blocks, b, g, tiles, n, 2, TILE)     each channel block's summand of the gradients of B / ln 2 and C
        grad_b_dt (b, g, segments, c), grad_A (b, g, segments, n, c)    each segment's summand, grad_A's divided by
                                        ln 2; grad_A must be zeros at first
    """
    EXACT: tl.constexpr = rows.dtype.element_ty == tl.float32
    channels, k, image, segment = _program_indices(c, g, segments, BLOCK)
    inside = None if ALL_CHANNELS else channels < c
    direction = image * g + k
    tiles = tl.cdiv(l, TILE)
    x += image * l * c + channels
    grad_y += image * l * c + channels
    rows += direction * tiles * TILE * K
    maps += direction * tiles * N * 2 * TILE
    offsets += k * tiles * TILE
    A += k * N * c + channels
    states += direction * tiles * N * c + channels
    grad_x += (k.to(tl.int64) * b + image) * l * c + channels
    grad_s += (k.to(tl.int64) * b + image) * l * c + channels
    block = tl.program_id(0) % tl.cdiv(c, BLOCK)
    grad_maps += ((block.to(tl.int64) * b + image) * g + k) * tiles * N * 2 * TILE + tl.arange(0, 2 * TILE)
    sums_offset = (direction * segments + segment) * c
    grad_A += sums_offset * N + channels
    W, part_size = _weights_of_program(W, c, g, k, BLOCK, K)
    if KEEP:
        weights = _weights(W, part_size, BLOCK, STEP, K, PARTS)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    rate_sum = tl.zeros((BLOCK,), tl.float32)
    gh = tl.zeros((BLOCK,), tl.float32)
    rate = _load(A, inside)
    if adjoint is not None:
        adjoint += sums_offset * N + channels
        gh = _load(adjoint, inside)

    first = segment * tiles_per_segment
    last = tl.minimum(first + tiles_per_segment, tiles)
    for step in range(0, last - first):
        tile = last - 1 - step
        if not KEEP:
            weights = _weights(W, part_size, BLOCK, STEP, K, PARTS)
        s = _projections(rows + tile * TILE * K, weights, BLOCK, TILE, STEP, K, PARTS, False)
        tokens = _eight(offsets + tile * TILE)
        steps = ()
        slopes = ()
        inputs = ()
        grads = ()
        through_inputs = ()                                                     # sum over n of gh_t ln 2 B_t
        through_decays = ()                                                     # and of gh_t exp(delta_t A) h A ln 2
        for t in tl.static_range(TILE):
            steps += (_softplus2(s[t], EXACT),)
            slopes += (_slope2(s[t], EXACT),)
            inputs += (_load(x + tokens[t] * UNIT, inside),)
            grads += (_load(grad_y + tokens[t] * UNIT, inside),)
            through_inputs += (tl.zeros((BLOCK,), tl.float32),)
            through_decays += (tl.zeros((BLOCK,), tl.float32),)

        for counter in range(N):
            n = counter
            if N > 1:
                n = _opaque(counter)
                rate = _load(A + n * c, inside)
                gh = _load(adjoint + n * c, inside)
                rate_sum = _load(grad_A + n * c, inside)
            h = (_load(states + (tile * N + n) * c, inside),)
            B_values = _eight(maps + (tile * N + n) * 2 * TILE)
            C_values = _eight(maps + (tile * N + n) * 2 * TILE + TILE)
            decays = ()
            C_rows = ()
            for t in tl.static_range(TILE):
                decays += (tl.exp2(steps[t] * rate),)
                h += (decays[t] * h[t] + (steps[t] * inputs[t]) * B_values[t],)
                C_rows += (grads[t] * h[t + 1],)
            B_rows = ()                                                           # from the last token
            more_inputs = ()
            more_decays = ()
            for t in tl.static_range(TILE - 1, -1, -1):
                gh += grads[t] * C_values[t]
                B_rows = (gh * (steps[t] * inputs[t]),) + B_rows  # noqa: RUF005 (Triton knows no stars)
                more_inputs = (through_inputs[t] + gh * B_values[t],) + more_inputs  # noqa: RUF005
                gh *= decays[t]
                through_decay = gh * h[t]
                more_decays = (through_decays[t] + through_decay * (rate * LN_2),) + more_decays  # noqa: RUF005
                rate_sum += through_decay * steps[t]
            through_inputs = more_inputs
            through_decays = more_decays
            tl.store(grad_maps + (tile * N + n) * 2 * TILE, _channel_sums(B_rows, C_rows, BLOCK, EXACT))
            if N > 1:
                tl.store(adjoint + n * c, gh, mask=inside)
                tl.store(grad_A + n * c, rate_sum, mask=inside)
        if N > 1:
            tl.debug_barrier()                                                  # adjoint and grad_A are loaded again

        for t in tl.static_range(TILE):
            exists = tile * TILE + t < l
            gs = (through_inputs[t] * inputs[t] + through_decays[t]) * slopes[t]
            bias_sum += gs
            _store_row(
                grad_x + tokens[t] * UNIT, through_inputs[t] * steps[t], channels, c, exists, ALL_CHANNELS, ALL_TOKENS)
            _store_row(grad_s + tokens[t] * UNIT, gs, channels, c, exists, ALL_CHANNELS, ALL_TOKENS)

    tl.store(grad_b_dt + sums_offset + channels, bias_sum, mask=inside)
    if N == 1:
        tl.store(grad_A, rate_sum, mask=inside)


@triton.jit(do_not_specialize=("b", "l"))
def _restore(
    grad_maps, paths, grad_B, grad_C,
    b, l, g, blocks,
    N: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr,
):
    """grad_B and grad_C (b, l, g, n) in grid order from their summands in `_scan_backward`."""
    program = tl.program_id(0)
    k = program % g
    tiles = tl.cdiv(l, TILE)
    programs = tl.cdiv(l, TOKENS)
    image = (program // g // programs).to(tl.int64)
    times = program // g % programs * TOKENS + tl.arange(0, TOKENS)
    inside = times < l
    tokens = image * l + tl.load(paths + k * l + times, mask=inside, other=0)
    grad_maps += ((image * g + k) * tiles + times // TILE) * (N * 2 * TILE) + times % TILE
    size = tl.cast(b, tl.int64) * g * tiles * (N * 2 * TILE)
    for n in range(N):
        total_B = tl.zeros((TOKENS,), tl.float32)
        total_C = tl.zeros((TOKENS,), tl.float32)
        for block in range(blocks):
            place = grad_maps + block * size + n * 2 * TILE
            total_B += tl.load(place, mask=inside, other=0.0)
            total_C += tl.load(place + TILE, mask=inside, other=0.0)
        place = (tokens * g + k) * N + n
        tl.store(grad_B + place, round_to(total_B * LN_2, grad_B.dtype.element_ty), mask=inside)
        tl.store(grad_C + place, round_to(total_C, grad_C.dtype.element_ty), mask=inside)


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
        rate = tl.load(A + (k * N + n) * c + channels, mask=inside, other=0.0).to(tl.float32)
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
    parts, skipped, D, y,
    tokens, c, g,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):
    """y = sum over k of parts[k] + D[k] * skipped, for parts (g, tokens, c), D (g, c), the others (tokens, c)."""
    blocks = tl.cdiv(c, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < tokens)[:, None] & (channels < c)[None, :]
    offset = rows[:, None] * c + channels[None, :]
    weight = tl.zeros((BLOCK,), tl.float32)
    for k in range(g):
        weight += tl.load(D + k * c + channels, mask=channels < c, other=0.0).to(tl.float32)
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


class Inputs(NamedTuple):
    """What the scan kernels read, as `_arrange` writes it; x is contiguous, A (g, n, c)."""

    x: Tensor
    rows: Tensor
    maps: Tensor
    W: Tensor
    offsets: Tensor
    A: Tensor


def _arrange_inputs(x, dt, B, C, W_dt, b_dt, A, paths) -> Inputs:
    (b, l, c), (g, _, r), n = x.shape, W_dt.shape, A.shape[2]
    dt, B, C = (unit_stride(tokens).flatten(0, 1) for tokens in (dt, B, C))
    tiles, chunks, k = triton.cdiv(l, TILE), triton.cdiv(c, FORWARD_BLOCK) * (FORWARD_BLOCK // 16), _padded_rank(r)
    parts = 1 if dt.dtype == torch.float32 or W_dt.dtype == b_dt.dtype == dt.dtype else 3
    inputs = Inputs(
        x=x.contiguous(),
        rows=dt.new_empty((b, g, tiles * TILE, k)),
        maps=dt.new_empty((b, g, tiles, n, 2, TILE), dtype=torch.float32),
        W=dt.new_empty((parts, g, chunks, 16 * k)),
        offsets=paths.new_empty((g, tiles * TILE), dtype=torch.int32),
        A=A.mT.contiguous(),
    )
    programs = b * g * triton.cdiv(tiles * TILE, ARRANGED_TOKENS)
    strides = [stride for tokens in (dt, B, C) for stride in tokens.stride()[:2]]
    _arrange[(programs + g * chunks,)](
        dt, B, C, W_dt.contiguous(), b_dt.contiguous(), paths.contiguous(), *inputs[1:5], *strides,
        b, l, c, g, tiles, programs, chunks,
        R=r, N=n, K=k, PARTS=parts, STEP=RANK_STEP, TILE=TILE, UNIT=_unit(c),
        TOKENS=ARRANGED_TOKENS, num_warps=1,
    )
    return inputs


def _padded_rank(r: int) -> int:
    """r and a column for the bias, rounded up."""
    return triton.cdiv(r + 1, RANK_STEP) * RANK_STEP


def _unit(c: int) -> int:
    """A known divisor of all offsets of tokens, so that neighbouring channels are loaded together."""
    return 16 if c % 16 == 0 else 1


def _options(inputs: Inputs, block: int) -> dict:
    _, l, c = inputs.x.shape
    parts, k, exact = inputs.W.shape[0], inputs.rows.shape[3], inputs.rows.dtype == torch.float32
    return {
        "N": inputs.A.shape[1], "K": k, "PARTS": parts, "STEP": RANK_STEP, "BLOCK": block, "TILE": TILE,
        "UNIT": _unit(c), "ALL_CHANNELS": c % block == 0, "ALL_TOKENS": l % TILE == 0,
        "KEEP": not exact and parts * k <= KEPT_RANK, "num_warps": 1, "num_stages": 1,
        # where the compiler's own choice spills a few to make room for another warp
        "maxnreg": None if exact == (block == BACKWARD_BLOCK) else 255,
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


def _initial_states(inputs: Inputs, sizes, options, adjoint: bool) -> Tensor | None:
    """Initial states of the segments in the direction of the scan: (b, g, segments, n, c); None for one zero state."""
    A = inputs.A
    b, l, c, g, segments, _ = sizes
    n = A.shape[1]
    if n == segments == 1:
        return None
    ends = torch.zeros((b, g, segments, n, c), dtype=torch.float32, device=A.device)
    if segments == 1:
        return ends
    starts, spans = torch.empty_like(ends), ends.new_empty((b, g, segments, c))
    blocks = triton.cdiv(c, FORWARD_BLOCK)
    _scan[(blocks * b * g * segments,)](
        *inputs, ends, ends, ends, spans, *sizes, **options, WRITES="ends", ADJOINT=adjoint,
    )
    _scan_segments[(blocks * b * g,)](
        A, ends, spans, starts, l, c, g, segments, N=n, BLOCK=FORWARD_BLOCK, ADJOINT=adjoint, num_warps=1,
    )
    return starts


def _merge_directions(parts: Tensor, skipped: Tensor, D: Tensor) -> Tensor:
    """Sum over g of parts (g, b, l, c) + D (g, c) * skipped (b, l, c), in float32."""
    y = torch.empty_like(skipped)
    tokens, c = skipped.shape[0] * skipped.shape[1], skipped.shape[2]
    grid = (triton.cdiv(c, MERGE_BLOCK) * triton.cdiv(tokens, MERGE_TOKENS),)
    _merge[grid](parts, skipped, D.contiguous(), y, tokens, c, parts.shape[0], TOKENS=MERGE_TOKENS, BLOCK=MERGE_BLOCK)
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


def direction_outputs(x, dt, B, C, W_dt, b_dt, A, paths, segments: int | None = None) -> Tensor:
    """y of each direction without D's part, (g, b, l, c) in x's dtype: what `forward` sums. x is contiguous."""
    (b, l, c), g = x.shape, A.shape[0]
    inputs = _arrange_inputs(x, dt, B, C, W_dt, b_dt, A, paths)
    segments, each = _cut(l, TILE, segments or _choose_segments(x, g, TILE))
    sizes, options = (b, l, c, g, segments, each), _options(inputs, FORWARD_BLOCK)
    state = _initial_states(inputs, sizes, options, adjoint=False)
    parts = x.new_empty((g, b, l, c))
    _scan[(triton.cdiv(c, FORWARD_BLOCK) * b * g * segments,)](
        *inputs, state, parts, parts, parts, *sizes, **options, WRITES="y", ADJOINT=False,
    )
    return parts


@on_tensor_device
def forward(x, dt, B, C, W_dt, b_dt, A, D, paths, segments: int | None = None):
    """As in the reference. segments: of each path; by default as many as fill the device."""
    x = x.contiguous()
    return _merge_directions(direction_outputs(x, dt, B, C, W_dt, b_dt, A, paths, segments), x, D)


@on_tensor_device
def backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths, segments: int | None = None):
    """As in the reference. segments: as in `forward`."""
    dtypes = [tensor.dtype for tensor in (x, dt, B, C, W_dt, b_dt, A, D)]
    (b, l, c), (g, _, n) = x.shape, A.shape
    blocks, tiles = triton.cdiv(c, BACKWARD_BLOCK), triton.cdiv(l, TILE)
    inputs = _arrange_inputs(x, dt, B, C, W_dt, b_dt, A, paths)
    x, grad_y = inputs.x, grad_y.contiguous()
    segments, each = _cut(l, TILE, segments or _choose_segments(x, g, TILE))
    sizes, options = (b, l, c, g, segments, each), _options(inputs, FORWARD_BLOCK)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    state = _initial_states(inputs, sizes, options, adjoint=False)
    adjoint = _initial_states(inputs._replace(x=grad_y), sizes, options, adjoint=True)
    states = empty(b, g, tiles, n, c)
    _scan[(triton.cdiv(c, FORWARD_BLOCK) * b * g * segments,)](
        *inputs, state, states, states, states, *sizes, **options, WRITES="states", ADJOINT=False,
    )
    parts, gs = x.new_empty((g, b, l, c)), x.new_empty((g, b, l, c))
    grad_maps, gB, gC = empty(blocks, b, g, tiles, n, 2, TILE), B.new_empty(B.shape), C.new_empty(C.shape)
    gb_dt, gA = empty(b, g, segments, c), empty(b, g, segments, n, c).zero_()
    _scan_backward[(blocks * b * g * segments,)](
        x, grad_y, *inputs[1:], states, adjoint, parts, gs, grad_maps, gb_dt, gA, *sizes,
        **_options(inputs, BACKWARD_BLOCK)
    )
    _restore[(b * g * triton.cdiv(l, ARRANGED_TOKENS),)](
        grad_maps, paths.contiguous(), gB, gC, b, l, g, blocks, N=n, TILE=TILE, TOKENS=ARRANGED_TOKENS, num_warps=1,
    )
    gdt, gW_dt = _projection_gradients(
        gs.view(g, b * l, c), dt.reshape(b * l, g, dt.shape[3]).transpose(0, 1), W_dt)
    gx = _merge_directions(parts, grad_y, D)
    grads = (
        gx, gdt.transpose(0, 1).reshape(dt.shape), gB, gC, gW_dt, gb_dt.sum((0, 2)),
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
