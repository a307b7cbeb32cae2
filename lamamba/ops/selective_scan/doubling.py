"""The selective scan as whole-tensor operations, without loops over tokens or writes in place: for exporters.

Two neighbouring steps h -> a h + v make one such step again: (a1, v1), then (a2, v2), are (a2 a1, a2 v1 + v2). Joining
every step with the one 1, 2, 4, 8, .. before it makes all l prefixes in log2(l) rounds (Hillis & Steele, 1986), at
log2(l) times the work of the recurrence. Forward only; letters as in lamamba.ops.selective_scan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, W_dt: Tensor, b_dt: Tensor, A: Tensor, D: Tensor, paths: Tensor
) -> Tensor:
    """Same contract as the reference."""
    u, low = x[:, paths].float(), _along(dt, paths).float()                     # (b, g, l, c), (b, g, l, r)
    delta = F.softplus(low @ W_dt.float().transpose(1, 2) + b_dt.float()[:, None])
    B, C = _along(B, paths).float(), _along(C, paths).float()                   # (b, g, l, n)
    y = D.float()[:, None] * u
    for n in range(A.shape[2]):                                                 # the states do not hear of each other
        decay = torch.exp(delta * A[:, None, :, n].float())
        y = y + C[..., n : n + 1] * _prefixes(decay, delta * u * B[..., n : n + 1])
    times = torch.arange(paths.shape[1], device=paths.device).expand_as(paths)
    back = torch.zeros_like(paths).scatter(1, paths, times)                     # when a direction reads each token
    return torch.stack([y[:, k, back[k]] for k in range(paths.shape[0])]).sum(0).to(x.dtype)


def _along(tokens: Tensor, paths: Tensor) -> Tensor:
    """(b, l, g, i), one set per direction in grid order, as each direction reads them: (b, g, l, i)."""
    return torch.stack([tokens[:, paths[k], k] for k in range(paths.shape[0])], dim=1)


def _prefixes(decay: Tensor, h: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + h_t along dimension 2."""
    length, reach = h.shape[2], 1
    while reach < length:
        earlier = F.pad(h[:, :, :-reach], (0, 0, reach, 0))
        h = h + decay * earlier
        decay = decay * F.pad(decay[:, :, :-reach], (0, 0, reach, 0), value=1.0)
        reach *= 2
    return h
