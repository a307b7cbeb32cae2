"""Selective scan over the tokens of a grid, along several paths (Mamba, arXiv 2312.00752; VMamba, arXiv 2401.10166).

Notation of this package:

    x      (b, l, c)        tokens in grid order
    dt     (b, l, g, r)     low-rank time steps of each direction
    B, C   (b, l, g, n)     input and output maps of the state
    W_dt   (g, c, r)        projects dt to all channels;   b_dt (g, c) its bias
    A      (g, c, n)        decay rates, negative;      D (g, c) skip weights
    paths  (g, l)           paths[k, t] = the t-th token of direction k
    u, delta, h, y          input, time step, state and output along a path

    sizes: b images, l tokens, c channels, g directions, r rank, n state size
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lamamba.ops.dispatch import Backend, Op, formula_gradients, needs_formula, requested_backend
from lamamba.ops.selective_scan import parallel_scan

OP = Op(
    "selective_scan",
    (
        Backend("triton", "lamamba.ops.selective_scan.triton_kernels"),
        Backend("cpu", "lamamba.ops.selective_scan.cpu"),
        Backend("torch", "lamamba.ops.selective_scan.chunked"),
        Backend("reference", "lamamba.ops.selective_scan.reference"),
    ),
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    W_dt: Tensor,
    b_dt: Tensor,
    A: Tensor,
    D: Tensor,
    paths: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Selective state-space scan along each path, summed over the paths: (b, l, c).

        delta_t = softplus(W_dt dt_t + b_dt)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = <C_t, h_t> + D u_t                             (Mamba, Eq. 2)

    The state h (b, g, c, n) is float32 for all inputs but float64, where it is float64.

    Any number of paths g >= 1, each a permutation of the tokens in any order: [[0, 1, ..., l - 1]] is Mamba's own scan
    of a sequence, a second row [l - 1, ..., 0] makes it bidirectional, `scan_paths` gives those of a grid. Tokens, dt,
    B and C stay in grid order. docs/layers.md has examples.

    Args:
        x: (b, l, c) tokens in grid order; u_t of path k is x[:, paths[k, t]].
        dt: (b, l, g, r) low-rank time steps of each path.
        B, C: (b, l, g, n) input and output maps of the state.
        W_dt, b_dt: (g, c, r) projects dt to all channels, and its bias (g, c).
        A, D: (g, c, n) decay rates, negative; (g, c) skip weights.
        paths: (g, l) int64, on x's device, permutations of 0 .. l - 1; a token that comes twice is not looked for.
        backend: name of a back end; by default the requested or automatic one (see lamamba.ops.dispatch).

    Returns:
        y (b, l, c), in grid order, in x's dtype.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or the back end's name is unknown.
        RuntimeError: when the requested back end does not support these inputs.
    """
    check_inputs(x, dt, B, C, W_dt, b_dt, A, D, paths)
    chosen = OP.choose(x, A.shape[2], backend)
    if needs_formula():
        if chosen not in ("torch", "reference") and (backend or requested_backend()) == chosen:
            raise RuntimeError(
                f"selective_scan: back end {chosen!r} has no rules for torch.func and forward-mode differentiation; "
                "request 'torch' or none")
        return parallel_scan.forward(x, dt, B, C, W_dt, b_dt, A, D, paths)
    return _selective_scan(x, dt, B, C, W_dt, b_dt, A, D, paths, chosen)


def check_inputs(x, dt, B, C, W_dt, b_dt, A, D, paths) -> None:
    """Raise ValueError for shapes, dtypes and devices that `selective_scan` does not take."""
    if not x.dim() == A.dim() == W_dt.dim() == 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, A {tuple(A.shape)} and W_dt {tuple(W_dt.shape)}; they are (b, l, c), "
            "(g, c, n) and (g, c, r)"
        )
    (b, l, c), (g, _, n) = x.shape, A.shape
    r = W_dt.shape[2]
    expected = {
        "dt": (dt, (b, l, g, r)), "B": (B, (b, l, g, n)), "C": (C, (b, l, g, n)), "W_dt": (W_dt, (g, c, r)),
        "b_dt": (b_dt, (g, c)), "A": (A, (g, c, n)), "D": (D, (g, c)), "paths": (paths, (g, l)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} where x {tuple(x.shape)} and A {tuple(A.shape)} need {shape}"
            )
    numbers = {"x": x, **{name: tensor for name, (tensor, _) in expected.items() if name != "paths"}}
    for name, tensor in numbers.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it holds real numbers, such as torch.float32")
    if paths.dtype != torch.int64 or paths.device != x.device:
        raise ValueError(
            f"paths is {paths.dtype} on {paths.device}; it holds numbers of tokens, torch.int64 on {x.device} as x"
        )
    if l == 0:
        raise ValueError("x has no tokens; a path must be at least one token long")


@torch.library.custom_op("lamamba::selective_scan", mutates_args=())
def _selective_scan(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, W_dt: Tensor, b_dt: Tensor, A: Tensor, D: Tensor, paths: Tensor,
    backend: str,
) -> Tensor:
    return OP.get(backend).load().forward(x, dt, B, C, W_dt, b_dt, A, D, paths)


@_selective_scan.register_fake
def _(x, dt, B, C, W_dt, b_dt, A, D, paths, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("lamamba::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad_y: Tensor,
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, W_dt: Tensor, b_dt: Tensor, A: Tensor, D: Tensor, paths: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return OP.get(backend).load().backward(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths)


@_selective_scan_backward.register_fake
def _(grad_y, x, dt, B, C, W_dt, b_dt, A, D, paths, backend):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, dt, B, C, W_dt, b_dt, A, D))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    if torch.is_grad_enabled():                                                 # gradients of gradients follow
        return *formula_gradients(parallel_scan.forward, ctx.saved_tensors, grad_y, ctx.needs_input_grad[:-1]), None
    return *_selective_scan_backward(grad_y, *ctx.saved_tensors, ctx.backend), None, None


_selective_scan.register_autograd(_backward, setup_context=_save)


def projection_multiply_adds(x_shape, W_dt_shape) -> int:
    """Multiply-adds of the projection W_dt dt: b l g c r."""
    (b, l, c), (g, _, r) = x_shape, W_dt_shape
    return b * l * g * c * r


def scan_operations(x_shape, A_shape) -> int:
    """Operations of the recurrence as VMamba and the paper count them: b (9 l g c n + l g c)."""
    (b, l, c), (g, _, n) = x_shape, A_shape
    return b * l * g * c * (9 * n + 1)


@register_flop_formula(torch.ops.lamamba.selective_scan)
def scan_flops(x_shape, dt, B, C, W_dt_shape, b_dt, A_shape, *rest, **kwargs) -> int:
    return 2 * projection_multiply_adds(x_shape, W_dt_shape) + scan_operations(x_shape, A_shape)


@register_flop_formula(torch.ops.lamamba.selective_scan_backward)
def _backward_flops(grad_shape, *shapes, **kwargs) -> int:
    return 3 * scan_flops(*shapes)
