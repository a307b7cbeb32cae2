"""Results of kernels against those of the formula in float64, and inputs of a scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamamba.ops.scan_paths import scan_paths

GRADIENTS = ("x", "dt", "B", "C", "W_dt", "b_dt", "A", "D")
LAST_UNITS = 2 * torch.finfo(torch.float32).eps
"""Two units in float32's last place: for where the formula is exact by chance."""


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the error over norm of the exact value; the former alone where that is zero."""
    norm = exact.norm()
    return ((value.double() - exact).norm() / norm).item() if norm > 0 else value.double().norm().item()


def assert_accurate(
    results: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], floor: float = LAST_UNITS
) -> None:
    """Every result has at most twice the error of the formula in the same dtype, or twice the floor."""
    errors = {
        place: (relative_error(ours, truth), 2 * max(relative_error(theirs, truth), floor))
        for place, (ours, theirs, truth) in enumerate(zip(results, plain, exact, strict=True))
    }
    wrong = {place: pair for place, pair in errors.items() if not pair[0] <= pair[1]}
    assert not wrong, f"(error, allowed): {wrong}"


def layer_results(function: Callable[..., Tensor], inputs: Sequence[Any], grad_y: Tensor) -> list[Tensor]:
    """y and the gradients of all inputs that require one."""
    y = function(*inputs)
    differentiable = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, differentiable, grad_y.to(y.dtype))]


def scan_inputs(
    b: int, height: int, width: int, c: int, n: int, r: int, dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None, scan: str = "continuous", device: str = "cpu",
    seed: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Arguments at the scale of a new network (delta log-uniform in [0.001, 0.1], A about -1..-n); a gradient of y.

    The seed is by default another one for every size.
    """
    seed = b + 10 * height + 100 * width + c + n + r if seed is None else seed
    random = torch.Generator(device).manual_seed(seed)
    l, g = height * width, 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, device=device)

    delta = torch.exp(uniform(g, c) * 4.6 - 6.9)
    b_dt = delta + torch.log(-torch.expm1(-delta))
    A = -torch.arange(1, n + 1, device=device) * (0.5 + uniform(g, c, n))
    tokens = [normal(b, l, c), normal(b, l, g, r), normal(b, l, g, n), normal(b, l, g, n)]
    parameters = [(2 * uniform(g, c, r) - 1) / r**0.5, b_dt, A, normal(g, c)]
    tensors = [t.to(dtype) for t in tokens] + [t.to(weights or dtype) for t in parameters]
    return [*tensors, scan_paths(height, width, scan, device=device)], normal(b, l, c).to(dtype)


def scan_results(backend: Any, inputs: Sequence[Tensor], grad_y: Tensor, **options: Any) -> list[Tensor]:
    """y and the gradients of all inputs but the paths."""
    return [backend.forward(*inputs, **options), *backend.backward(grad_y, *inputs, **options)]


def check_scan(
    kernels: Any, formula: Any, inputs: Sequence[Tensor], grad_y: Tensor, floor: float = LAST_UNITS, **options: Any
) -> None:
    """Shapes and dtypes of y and all gradients, and `assert_accurate` of them, by two back ends."""
    results = scan_results(kernels, inputs, grad_y, **options)
    for name, result, like in zip(("y", *GRADIENTS), results, [inputs[0], *inputs[:-1]], strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype), name
    plain, exact = (
        scan_results(formula, [t.to(dtype) if t.is_floating_point() else t for t in inputs], grad_y.to(dtype))
        for dtype in (inputs[0].dtype, torch.float64)
    )
    assert_accurate(results, plain, exact, floor)
