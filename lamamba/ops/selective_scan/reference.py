"""Reference implementation of the selective scan and its gradients: the recurrence, token by token, in PyTorch.

Notation as in lamamba.ops.selective_scan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.ops.scan_paths import inverse_paths


def unsupported_reason(device_type: str, dtype: torch.dtype, state_size: int) -> str | None:
    return None


def along_paths(tokens: Tensor, paths: Tensor) -> Tensor:
    """Gather tokens (b, l, g, ...) in grid order along each direction's path: (b, g, l, ...)."""
    directions = torch.arange(paths.shape[0], device=paths.device)[:, None]
    return tokens[:, paths, directions]


def to_grid(tokens: Tensor, paths: Tensor) -> Tensor:
    """Scatter tokens (b, g, l, ...) along their paths to grid order: (b, l, g, ...), the inverse of `along_paths`."""
    directions = torch.arange(paths.shape[0], device=paths.device)[:, None]
    return tokens[:, directions, inverse_paths(paths)].transpose(1, 2)


def scan_inputs(x, dt, B, C, W_dt, b_dt, paths):
    """Gather all inputs along the paths in the state's dtype: u, dt, s (before softplus), delta, B, C."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x[:, paths].to(dtype)                                                   # (b, g, l, c)
    dt, B, C = (along_paths(tokens, paths).to(dtype) for tokens in (dt, B, C))
    s = dt @ W_dt.to(dtype).mT + b_dt.to(dtype)[:, None]                        # (b, g, l, c)
    return u, dt, s, F.softplus(s), B, C


def forward(x, dt, B, C, W_dt, b_dt, A, D, paths):
    """Compute y (b, l, c), in x's dtype.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,    y_t = <C_t, h_t> + D u_t
    """
    u, _, _, delta, B, C = scan_inputs(x, dt, B, C, W_dt, b_dt, paths)
    A, D = A.to(u.dtype), D.to(u.dtype)
    h = u.new_zeros(*u.shape[:2], *A.shape[1:])                                 # (b, g, c, n)
    y = torch.empty_like(u)
    for t in range(u.shape[2]):
        decay = torch.exp(delta[:, :, t, :, None] * A)
        h = decay * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None, :]
        y[:, :, t] = (h * C[:, :, t, None, :]).sum(-1) + D * u[:, :, t]
    return to_grid(y, paths).sum(2).to(x.dtype)


def backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths):
    """Compute the gradients of (x, dt, B, C, W_dt, b_dt, A, D), each in its input's dtype, by the adjoint recurrence.

        gh_t = C_t gy_t + exp(delta_{t+1} A) gh_{t+1}
    """
    dtypes = [tensor.dtype for tensor in (x, dt, B, C, W_dt, b_dt, A, D)]
    u, dt, s, delta, B, C = scan_inputs(x, dt, B, C, W_dt, b_dt, paths)
    A, D, W_dt = A.to(u.dtype), D.to(u.dtype), W_dt.to(u.dtype)
    gy = grad_y[:, paths].to(u.dtype)
    length = u.shape[2]

    states = [u.new_zeros(*u.shape[:2], *A.shape[1:])]
    for t in range(length):
        decay = torch.exp(delta[:, :, t, :, None] * A)
        states.append(decay * states[-1] + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None, :])

    gu, gdelta, gB, gC = D[:, None] * gy, torch.empty_like(delta), torch.empty_like(B), torch.empty_like(C)
    gA, gh = torch.zeros_like(A), torch.zeros_like(states[0])
    for t in reversed(range(length)):
        step, decay = delta[:, :, t, :, None], torch.exp(delta[:, :, t, :, None] * A)
        gh = gh + gy[:, :, t, :, None] * C[:, :, t, None, :]
        gC[:, :, t] = (gy[:, :, t, :, None] * states[t + 1]).sum(-2)
        gB[:, :, t] = (gh * (step * u[:, :, t, :, None])).sum(-2)
        through_input = (gh * B[:, :, t, None, :]).sum(-1)
        through_decay = gh * states[t] * decay
        gu[:, :, t] += through_input * delta[:, :, t]
        gdelta[:, :, t] = through_input * u[:, :, t] + (through_decay * A).sum(-1)
        gA += (through_decay * step).sum(0)
        gh = decay * gh
    gs = gdelta * torch.sigmoid(s)                                              # softplus' = sigmoid
    grads = (
        to_grid(gu, paths).sum(2), to_grid(gs @ W_dt, paths), to_grid(gB, paths), to_grid(gC, paths),
        torch.einsum("bglc,bglr->gcr", gs, dt), gs.sum((0, 2)), gA, (gy * u).sum((0, 2)),
    )
    return tuple(grad.to(dtype).contiguous() for grad, dtype in zip(grads, dtypes, strict=True))
