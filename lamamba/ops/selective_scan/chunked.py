"""Chunked selective scan in vectorised PyTorch, for any device.

A path of l tokens is cut into segments of about sqrt(l). All segments are scanned in parallel from a zero state, then
the states at their ends are scanned over the segments, then each token adds the contribution of its segment's initial
state: about 2 sqrt(l) dependent steps instead of l. The n states are processed one at a time to save memory; the
backward pass saves no state and recomputes the scan. Products of decays are exponentials of sums of delta A <= 0: they
never overflow.

Segmented tensors are (b, g, segments, size, c); the last segment is padded with tokens of delta 0 and input 0, which
leave the state unchanged.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.selective_scan.reference import scan_inputs, to_grid


def unsupported_reason(device_type: str, dtype: torch.dtype, state_size: int) -> str | None:
    return None


def _cut(tokens: Tensor, size: int) -> Tensor:
    """Split (b, g, l, c) into padded segments; a view where size divides l."""
    b, g, l, c = tokens.shape
    if l % size:
        tokens = F.pad(tokens, (0, 0, 0, -l % size))
    return tokens.reshape(b, g, tokens.shape[2] // size, size, c)


def _join(segments: Tensor, length: int) -> Tensor:
    return segments.flatten(2, 3)[:, :, :length]


class _Decays(NamedTuple):
    """Decays exp(sum of delta A) of one of the n states, all segmented."""

    step: Tensor
    """From token t - 1 to t: exp(delta_t A)."""
    from_start: Tensor
    """From the segment's initial state to t."""
    to_end: Tensor | None
    """From t to the segment's last token; of the backward pass only."""


def _decays(delta: Tensor, total: Tensor, A: Tensor, with_end: bool = False) -> _Decays:
    """Compute the decays from delta and total, its cumulative sum within each segment; A (g, 1, 1, c)."""
    to_end = torch.exp_((total[:, :, :, -1:] - total) * A) if with_end else None
    return _Decays(torch.exp_(delta * A), torch.exp_(total * A), to_end)


def _scan_forward(decays: _Decays, h: Tensor) -> Tensor:
    """Scan h_t = exp(delta_t A) h_{t-1} + h_t along the whole path, in place."""
    segments, size = h.shape[2:4]
    for t in range(1, size):
        h[:, :, :, t].addcmul_(decays.step[:, :, :, t], h[:, :, :, t - 1])
    if segments == 1:
        return h
    starts = torch.zeros_like(h[:, :, :, 0])                                    # (b, g, segments, c)
    for s in range(1, segments):
        torch.addcmul(h[:, :, s - 1, -1], decays.from_start[:, :, s - 1, -1], starts[:, :, s - 1], out=starts[:, :, s])
    return h.addcmul_(decays.from_start, starts[:, :, :, None])


def _scan_backward(decays: _Decays, gh: Tensor) -> Tensor:
    """Scan gh_t = gh_t + exp(delta_{t+1} A) gh_{t+1} from the last token of the path, in place."""
    assert decays.to_end is not None
    segments, size = gh.shape[2:4]
    for t in reversed(range(size - 1)):
        gh[:, :, :, t].addcmul_(decays.step[:, :, :, t + 1], gh[:, :, :, t + 1])
    if segments == 1:
        return gh
    ends = torch.zeros_like(gh[:, :, :, 0])                                     # adjoint of each segment's end
    for s in reversed(range(segments - 1)):
        first = torch.addcmul(gh[:, :, s + 1, 0], decays.to_end[:, :, s + 1, 0], ends[:, :, s + 1])
        torch.mul(decays.step[:, :, s + 1, 0], first, out=ends[:, :, s])
    return gh.addcmul_(decays.to_end, ends[:, :, :, None])


def _segment_size(length: int) -> int:
    return math.isqrt(length - 1) + 1


def forward(x, dt, B, C, W_dt, b_dt, A, D, paths):
    """As in the reference."""
    u, _, _, delta, B, C = scan_inputs(x, dt, B, C, W_dt, b_dt, paths)
    A, D = A.to(u.dtype)[:, None, None], D.to(u.dtype)                          # A (g, 1, 1, c, n)
    length, size = u.shape[2], _segment_size(u.shape[2])
    steps, inputs = _cut(delta, size), _cut(delta * u, size)
    total, B = steps.cumsum(3), _cut(B, size)
    y = D[:, None] * u
    for n in range(A.shape[-1]):
        h = _scan_forward(_decays(steps, total, A[..., n]), inputs * B[..., n, None])
        y.addcmul_(_join(h, length), C[..., n, None])
    return to_grid(y, paths).sum(2).to(x.dtype)


def backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths):
    """As in the reference."""
    dtypes = [tensor.dtype for tensor in (x, dt, B, C, W_dt, b_dt, A, D)]
    u, dt, s, delta, B, C = scan_inputs(x, dt, B, C, W_dt, b_dt, paths)
    A, D, W_dt = A.to(u.dtype)[:, None, None], D.to(u.dtype), W_dt.to(u.dtype)
    gy = grad_y[:, paths].to(u.dtype)
    gu, gD = D[:, None] * gy, (gy * u).sum((0, 2))
    length, size = u.shape[2], _segment_size(u.shape[2])
    u, steps, gy, B, C = (_cut(tokens, size) for tokens in (u, delta, gy, B, C))
    total, inputs = steps.cumsum(3), steps * u

    ginputs, gsteps, gB, gC, gA = torch.zeros_like(u), torch.zeros_like(u), [], [], []
    for n in range(A.shape[-1]):
        A_n, B_n, C_n = A[..., n], B[..., n, None], C[..., n, None]
        decays = _decays(steps, total, A_n, with_end=True)
        h = _scan_forward(decays, inputs * B_n)
        gh = _scan_backward(decays, gy * C_n)
        gC.append(torch.linalg.vecdot(gy, h))
        gB.append(torch.linalg.vecdot(gh, inputs))
        ginputs.addcmul_(gh, B_n)
        earlier = F.pad(h.flatten(2, 3)[:, :, :-1], (0, 0, 1, 0)).view_as(h)
        through_decay = gh.mul_(decays.step).mul_(earlier)
        gsteps.addcmul_(through_decay, A_n)
        gA.append((through_decay * steps).sum((0, 2, 3)))
    gu += _join(ginputs * steps, length)
    gs = _join(gsteps.addcmul_(ginputs, u), length) * torch.sigmoid(s)          # softplus' = sigmoid
    grads = (
        to_grid(gu, paths).sum(2), to_grid(gs @ W_dt, paths),
        to_grid(_join(torch.stack(gB, -1), length), paths), to_grid(_join(torch.stack(gC, -1), length), paths),
        torch.einsum("bglc,bglr->gcr", gs, dt), gs.sum((0, 2)), torch.stack(gA, -1), gD,
    )
    return tuple(grad.to(dtype).contiguous() for grad, dtype in zip(grads, dtypes, strict=True))
