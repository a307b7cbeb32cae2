"""Selective scan as a parallel prefix scan of whole-tensor operations, without loops over tokens: for
export, torch.func and forward-mode differentiation.

Steps h -> a h + v compose associatively: (a1, v1), then (a2, v2), is (a2 a1, a2 v1 + v2). Composing every step with the
one 1, 2, 4, 8, .. before it computes all l prefixes in log2(l) rounds (Hillis & Steele, 1986), at log2(l) times the
work of the recurrence. Notation as in lamamba.ops.selective_scan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, W_dt: Tensor, b_dt: Tensor, A: Tensor, D: Tensor, paths: Tensor
) -> Tensor:
    """As in the reference."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, C, dt = (_along_paths(tokens, paths).to(dtype) for tokens in (B, C, dt))             # (b, g, l, n), (b, g, l, r)
    W_dt, b_dt, A, D = (parameter.to(dtype) for parameter in (W_dt, b_dt, A, D))
    u = x[:, paths].to(dtype)                                                               # (b, g, l, c)
    delta = F.softplus(dt @ W_dt.transpose(1, 2) + b_dt[:, None])
    y = D[:, None] * u
    for n in range(A.shape[2]):
        decay = torch.exp(delta * A[:, None, :, n])
        y = y + C[..., n : n + 1] * _prefixes(decay, delta * u * B[..., n : n + 1])
    times = torch.arange(paths.shape[1], device=paths.device).expand_as(paths)
    inverse = torch.zeros_like(paths).scatter(1, paths, times)
    return torch.stack([y[:, k, inverse[k]] for k in range(paths.shape[0])]).sum(0).to(x.dtype)


def _along_paths(tokens: Tensor, paths: Tensor) -> Tensor:
    """Gather tokens (b, l, g, i) in grid order along each direction's path: (b, g, l, i)."""
    return torch.stack([tokens[:, paths[k], k] for k in range(paths.shape[0])], dim=1)


def _prefixes(decay: Tensor, h: Tensor) -> Tensor:
    """Prefix scan h_t = decay_t h_{t-1} + h_t along dimension 2."""
    length, distance = h.shape[2], 1
    while distance < length:
        earlier = F.pad(h[:, :, :-distance], (0, 0, distance, 0))
        h = h + decay * earlier
        decay = decay * F.pad(decay[:, :, :-distance], (0, 0, distance, 0), value=1.0)
        distance *= 2
    return h
