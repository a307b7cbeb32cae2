"""The selective scan in vectorised PyTorch: any device, no compiler, fast enough to train small networks.

The path of l tokens is cut into segments of about sqrt(l). All segments run side by side from a zero state, then the
states at their ends are carried from one to the next, then each segment adds what its first state contributes: about
2 sqrt(l) dependent steps instead of l. One state of the n is in memory at a time; the backward pass keeps no state and
runs the scan again. Products of decays are exponentials of sums of -delta |A| <= 0: they never overflow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.selective_scan.reference import read, to_grid


def refusal(x: Tensor, state_size: int) -> str | None:
    return None


def _segments(tokens: Tensor, size: int) -> Tensor:
    """Cut (b, g, l, c) into (size, b, g, segments, c), time first; the last segment is filled with zeros."""
    b, g, l, c = tokens.shape
    tokens = F.pad(tokens, (0, 0, 0, -l % size))
    return tokens.view(b, g, tokens.shape[2] // size, size, c).permute(3, 0, 1, 2, 4).contiguous()


def _join(segments: Tensor, length: int) -> Tensor:
    size, b, g, count, c = segments.shape
    return segments.permute(1, 2, 3, 0, 4).reshape(b, g, count * size, c)[:, :, :length]


def _linear_scan(delta: Tensor, total: Tensor, A: Tensor, h: Tensor) -> Tensor:
    """In place h_t = exp(delta_t A) h_{t-1} + h_t over segments (size, b, g, segments, c).

    total is the running sum of delta within each segment, A (g, 1, c) one state's rate. A filled-up token has delta 0
    and input 0 and so keeps the state.
    """
    decay = torch.exp(delta * A)
    for t in range(1, h.shape[0]):
        h[t].addcmul_(decay[t], h[t - 1])
    if h.shape[3] == 1:
        return h
    from_start = torch.exp_(total * A)
    ends, spans = h[-1], from_start[-1]                                         # (b, g, segments, c)
    starts = torch.zeros_like(ends)
    for segment in range(1, h.shape[3]):
        torch.addcmul(ends[:, :, segment - 1], spans[:, :, segment - 1], starts[:, :, segment - 1],
                      out=starts[:, :, segment])
    return h.addcmul_(from_start, starts)


def _run(delta: Tensor, A: Tensor, inputs: Tensor, size: int) -> Tensor:
    """h of one state for delta and inputs (b, g, l, c) along the paths."""
    length = delta.shape[2]
    delta = _segments(delta, size)
    return _join(_linear_scan(delta, delta.cumsum(0), A, _segments(inputs, size)), length)


def forward(x, dt, B, C, W_dt, b_dt, A, D, paths):
    """Same contract as the reference."""
    u, _, _, delta, B, C = read(x, dt, B, C, W_dt, b_dt, paths)
    A, D = A.to(u.dtype), D.to(u.dtype)
    length = u.shape[2]
    size = math.isqrt(length - 1) + 1
    steps = _segments(delta, size)
    total, inputs = steps.cumsum(0), _segments(delta * u, size)
    y = D[:, None] * u
    for n in range(A.shape[2]):
        h = _linear_scan(steps, total, A[:, None, :, n], inputs * _segments(B[..., n, None], size))
        y.addcmul_(_join(h, length), C[..., n, None])
    return to_grid(y, paths).sum(2).to(x.dtype)


def backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths):
    """Same contract as the reference: gh is the same scan, run from the last token with delta one token later."""
    dtypes = [tensor.dtype for tensor in (x, dt, B, C, W_dt, b_dt, A, D)]
    u, low, s, delta, B, C = read(x, dt, B, C, W_dt, b_dt, paths)
    A, D, W_dt = A.to(u.dtype), D.to(u.dtype), W_dt.to(u.dtype)
    gy = grad_y[:, paths].to(u.dtype)
    size = math.isqrt(u.shape[2] - 1) + 1
    later = F.pad(delta[:, :, 1:], (0, 0, 0, 1)).flip(2)

    gu, gdelta, gB, gC, gA = D[:, None] * gy, torch.zeros_like(delta), [], [], []
    for n in range(A.shape[2]):
        A_n, B_n, C_n = A[:, None, :, n], B[..., n, None], C[..., n, None]
        h = _run(delta, A_n, delta * u * B_n, size)
        gh = _run(later, A_n, (gy * C_n).flip(2), size).flip(2)
        gC.append((gy * h).sum(-1))
        gB.append((gh * delta * u).sum(-1))
        gu.addcmul_(gh * delta, B_n)
        through_decay = gh * F.pad(h[:, :, :-1], (0, 0, 1, 0)) * torch.exp(delta * A_n)
        gdelta.addcmul_(gh * u, B_n).addcmul_(through_decay, A_n)
        gA.append((through_decay * delta).sum((0, 2)))
    gs = gdelta * torch.sigmoid(s)
    grads = (
        to_grid(gu, paths).sum(2), to_grid(gs @ W_dt, paths),
        to_grid(torch.stack(gB, -1), paths), to_grid(torch.stack(gC, -1), paths),
        torch.einsum("bglc,bglr->gcr", gs, low), gs.sum((0, 2)), torch.stack(gA, -1), (gy * u).sum((0, 2)),
    )
    return tuple(grad.to(dtype).contiguous() for grad, dtype in zip(grads, dtypes, strict=True))
