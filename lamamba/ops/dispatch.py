"""Which implementation of an op runs, why, and how a user forces one.

    argument > context manager > environment variable LAMAMBA_BACKEND > automatic

A choice is obeyed or refused with its reason, never replaced in silence. The automatic choice is the first of the
op's back ends, fastest first, that can take the inputs; it is logged once, with its reason.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lamamba.config import unknown_name

logger = logging.getLogger("lamamba.ops")

ENVIRONMENT_VARIABLE = "LAMAMBA_BACKEND"

_forced: list[str] = []


@dataclass(frozen=True)
class Backend:
    """One implementation of an op, as a module that may not be importable here.

    The module has `forward`, `backward` and `unsupported_reason(device_type, dtype, state_size)`: why it takes no such
    inputs, or None. Only a missing module (ModuleNotFoundError) lets the automatic choice pass a back end over.
    """

    name: str
    module: str

    def load(self) -> Any:
        """The module.

        Raises:
            ModuleNotFoundError: when a module that it needs is not installed.
        """
        module, missing = _import_once(self.module)
        if missing:
            raise ModuleNotFoundError(missing)
        return module

    def unsupported_reason(self, device_type: str, dtype: torch.dtype, state_size: int) -> str | None:
        """Why this back end cannot run such inputs here; None when it can."""
        module, missing = _import_once(self.module)
        return missing or module.unsupported_reason(device_type, dtype, state_size)


@cache
def _import_once(module: str) -> tuple[Any, str | None]:
    """A module, or what it misses. Remembered: Python searches for a missing module anew at every import."""
    try:
        return importlib.import_module(module), None
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"


@dataclass(frozen=True)
class Op:
    """An op's name and its back ends, fastest first."""

    name: str
    backends: tuple[Backend, ...]

    def get(self, name: str) -> Backend:
        """The back end of this name.

        Raises:
            ValueError: for an unknown name; the nearest known one is named.
        """
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise unknown_name("back end", name, [*(backend.name for backend in self.backends), "auto"])

    def choose(self, x: Tensor, state_size: int, requested: str | None = None) -> str:
        """The name of the back end that will run these inputs.

        Under torch.compile the choice is made while compiling.

        Raises:
            ValueError: when the requested name is unknown.
            RuntimeError: when the requested back end cannot run these inputs here, with the reason.
        """
        source = "argument"
        if requested is None and _forced:
            requested, source = _forced[-1], "context manager"
        if requested is None and (value := os.environ.get(ENVIRONMENT_VARIABLE)):
            requested, source = value, f"environment variable {ENVIRONMENT_VARIABLE}"
        return _choose(self, x.device.type, x.dtype, state_size, requested, source)


@torch.compiler.assume_constant_result
def _choose(op: Op, device_type: str, dtype: torch.dtype, state_size: int, requested: str | None, source: str) -> str:
    if requested is not None and requested != "auto":
        backend = op.get(requested)
        if device_type != "meta" and (reason := backend.unsupported_reason(device_type, dtype, state_size)):
            raise RuntimeError(f"{op.name}: back end {requested!r} ({source}) cannot run here: {reason}")
        return backend.name
    passed_over: list[str] = []
    for backend in op.backends:
        reason = backend.unsupported_reason(device_type, dtype, state_size)
        if reason is None:
            _log_once(op.name, backend.name, device_type, tuple(passed_over))
            return backend.name
        passed_over.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"{op.name}: no back end can run here ({'; '.join(passed_over)})")


@cache
def _log_once(op: str, backend: str, device_type: str, passed_over: tuple[str, ...]) -> None:
    reason = "; ".join(passed_over) or "the fastest one"
    logger.debug("%s on %s uses back end %r (%s)", op, device_type, backend, reason)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on this back end ("auto" restores the automatic choice).

        with lamamba.ops.use_backend("reference"):
            model(x, timestep, class_labels)
    """
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def backend_in_force() -> str:
    """The name that the context manager or the environment demands; "auto" where neither does."""
    return _forced[-1] if _forced else os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
