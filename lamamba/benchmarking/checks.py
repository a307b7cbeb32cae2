"""Checks of back ends against the reference implementations in float64, for `lamamba.doctor`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lamamba.ops import layers
from lamamba.ops.scan_paths import scan_paths
from lamamba.ops.selective_scan import reference

MAX_ERROR = 1e-4
"""Bound of the largest error over the largest value in float32, forward and gradients; measured: about 1e-6."""
RESULTS = ("y", "x", "dt", "B", "C", "W_dt", "b_dt", "A", "D")


def unsupported_reason(backend: Any, device: str, dtype: Any, state_size: int = 1) -> str | None:
    """Why a back end cannot run here: its own reason, or an invalid setting; None where it can."""
    try:
        return backend.unsupported_reason(device.split(":")[0], dtype, state_size)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return str(error)


def check_backend(op: Any, backend: Any, device: str) -> dict[str, Any] | None:
    """Largest relative error of a back end in float32, forward and in every gradient; None where it cannot run.

    Args:
        op: the operator.
        backend: one of op.backends.
        device: "cpu" or "cuda:i".

    Returns:
        op, backend, device, passed, and either error (text), or forward_error, gradient_error, worst (the output with
        the largest error) and seconds.
    """
    if unsupported_reason(backend, device, torch.float32, state_size=2):
        return None

    def measure() -> dict[str, float]:
        inputs, grad_y = _small_inputs()
        exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        expected = [reference.forward(*exact), *reference.backward(grad_y.double(), *exact)]
        module = backend.load()
        there, gradient = [tensor.to(device) for tensor in inputs], grad_y.to(device)
        results = [module.forward(*there), *module.backward(gradient, *there)]
        return {name: _error(*pair) for name, *pair in zip(RESULTS, results, expected, strict=True)}

    return _check({"op": op.name, "backend": backend.name, "device": device}, measure)


def check_layers(device: str) -> dict[str, Any]:
    """Largest relative error in float32 of the layers that a device uses without gradients; fields as above."""
    random = torch.Generator().manual_seed(0)
    (b, h, w, c), heads = (2, 5, 7, 20), 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    calls = {
        "modulated_norm": (normal(b, h, w, c), normal(c), normal(c), normal(b, c), normal(b, c), 1e-5),
        "gated_norm": (normal(b, h, w, c), normal(b, h, w, c), normal(c), normal(c), 1e-5),
        "local_mixing": (normal(b, h, w, c), normal(c, 1, 3, 3)),
        "window_attention": (normal(b, h, w, 3 * c), normal(heads, 16, 16), None, heads, (4, 4), (0, 0)),
    }
    found: dict[str, Any] = {"op": "layers", "backend": "?", "device": device}

    def measure() -> dict[str, float]:
        errors = {}
        for name, arguments in calls.items():
            exact = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
            there = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
            with torch.no_grad():
                errors[name] = _error(getattr(layers, name)(*there), getattr(layers.reference, name)(*exact))
        found["backend"] = layers.backend_for(torch.zeros((1, 1, 1, 1), device=device))
        return errors

    return _check(found, measure)


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.cpu().double() - truth).abs().max() / truth.abs().max())


def _check(found: dict[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """A finding with the errors of y and of gradients, or of layers, or with the failure to measure them."""
    began = time.perf_counter()
    try:
        errors = measure()
    except Exception as error:                                                  # any error is a result of the check
        return {**found, "passed": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    ranked = sorted(errors, key=lambda name: (errors[name] != errors[name], errors[name]))          # NaN is the worst
    found |= {"forward_error": errors.get("y", errors[ranked[-1]])}
    if "y" in errors:
        found |= {"gradient_error": errors[next(name for name in reversed(ranked) if name != "y")]}
    return {
        **found, "worst": ranked[-1], "passed": all(error <= MAX_ERROR for error in errors.values()),
        "seconds": time.perf_counter() - began,
    }


def _small_inputs() -> tuple[list[Any], Any]:
    """Inputs of the scan at the scale of an untrained network, on a grid whose sizes no vector width divides."""
    random = torch.Generator().manual_seed(0)
    (height, width), b, c, g, n, r = (5, 7), 2, 20, 4, 2, 3

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    delta = torch.exp(torch.rand((g, c), generator=random) * 4.6 - 6.9)         # 0.001 to 0.1
    tokens = [normal(b, height * width, *rest) for rest in ((c,), (g, r), (g, n), (g, n))]
    A = -torch.arange(1.0, n + 1).expand(g, c, n).contiguous()
    parameters = [normal(g, c, r) * 0.3, torch.log(torch.expm1(delta)), A, normal(g, c)]
    return [*tokens, *parameters, scan_paths(height, width)], normal(b, height * width, c)
