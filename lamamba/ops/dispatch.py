"""Choice of the back end that runs an operator.

    argument > context manager > environment variable LAMAMBA_BACKEND > automatic

A requested back end runs, or raises with the reason why it cannot: it is never replaced. The automatic choice is the
first of the op's back ends, fastest first, that supports the inputs; it is logged once, with its reason.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lamamba.config import unknown_name

logger = logging.getLogger("lamamba.ops")

ENVIRONMENT_VARIABLE = "LAMAMBA_BACKEND"

_forced: list[str] = []
_ops: dict[str, Op] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an op, in a module that may not be importable.

    The module has `forward`, `backward` and `unsupported_reason(device_type, dtype, state_size)`. Of all import errors,
    only ModuleNotFoundError makes the automatic choice skip a back end.
    """

    name: str
    module: str

    def load(self) -> Any:
        """Import and return the module.

        Raises:
            ModuleNotFoundError: when a module that it imports is not installed.
        """
        module, missing = _import_once(self.module)
        if missing:
            raise ModuleNotFoundError(missing)
        return module

    def unsupported_reason(self, device_type: str, dtype: torch.dtype, state_size: int) -> str | None:
        """Return why this back end does not support such inputs here; None when it does."""
        module, missing = _import_once(self.module)
        return missing or module.unsupported_reason(device_type, dtype, state_size)


@cache
def _import_once(module: str) -> tuple[Any, str | None]:
    """Return a module, or what is not installed. Cached: Python searches again for a missing module each time."""
    try:
        return importlib.import_module(module), None
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"


@dataclass(frozen=True)
class Op:
    """An op's name and its back ends, fastest first."""

    name: str
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        _ops[self.name] = self

    def get(self, name: str) -> Backend:
        """Return the back end of this name.

        Raises:
            ValueError: for an unknown name, with the nearest known one.
        """
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise unknown_name("back end", name, [*(backend.name for backend in self.backends), "auto"])

    def choose(self, x: Tensor, state_size: int, requested: str | None = None) -> str:
        """Return the name of the back end that runs these inputs. Under torch.compile it is fixed while compiling.

        Args:
            x: the tokens; their device and dtype decide.
            state_size: N.
            requested: a name, or None for the context manager's, the environment's or the automatic choice.

        Raises:
            ValueError: when the requested name is unknown.
            RuntimeError: when the requested back end does not support these inputs, with the reason.
        """
        source = "argument"
        if requested is None and _forced:
            requested, source = _forced[-1], "context manager"
        if requested is None and (value := os.environ.get(ENVIRONMENT_VARIABLE)):
            requested, source = value, f"environment variable {ENVIRONMENT_VARIABLE}"
        return _choose(self.name, x.device.type, x.dtype, state_size, requested, source)


@torch.compiler.assume_constant_result
def _choose(
    name: str, device_type: str, dtype: torch.dtype, state_size: int, requested: str | None, source: str
) -> str:
    op = _ops[name]                                                             # torch 2.11 wants plain arguments
    if requested is not None and requested != "auto":
        backend = op.get(requested)
        if device_type != "meta" and (reason := backend.unsupported_reason(device_type, dtype, state_size)):
            raise RuntimeError(f"{op.name}: back end {requested!r} ({source}) cannot run here: {reason}")
        return backend.name
    skipped: list[str] = []
    for backend in op.backends:
        reason = backend.unsupported_reason(device_type, dtype, state_size)
        if reason is None:
            _log_once(op.name, backend.name, device_type, tuple(skipped))
            return backend.name
        skipped.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"{op.name}: no back end can run here ({'; '.join(skipped)})")


@cache
def _log_once(op: str, backend: str, device_type: str, skipped: tuple[str, ...]) -> None:
    reason = "; ".join(skipped) or "the fastest one"
    logger.debug("%s on %s uses back end %r (%s)", op, device_type, backend, reason)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager that sets the back end of all ops; "auto" restores the automatic choice.

        with lamamba.ops.use_backend("reference"):
            model(x, timestep, class_labels)
    """
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation follows what is computed now.

    Our kernels have no rules for these and would lose tangents without a word: PyTorch's own operations must run.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0     # neither has a public name


def needs_formula() -> bool:
    """Whether PyTorch's own operations must run: where `is_transformed`, and in torch.onnx.export."""
    return is_transformed() or _exports_onnx()


@torch.compiler.assume_constant_result
def _exports_onnx() -> bool:
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()       # importing it takes time


def formula_gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Any], grad_y: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of formula(*inputs) by PyTorch's operations, which have gradients themselves; None where not needed."""
    wanted = [x for x, is_needed in zip(inputs, needed, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(formula(*inputs), wanted, grad_y, create_graph=True))
    return [next(grads) if is_needed else None for is_needed in needed]


def requested_backend() -> str:
    """Return the name that the context manager or the environment requests; "auto" where neither does."""
    return _forced[-1] if _forced else os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
