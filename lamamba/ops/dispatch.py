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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lamamba.config import unknown_name

logger = logging.getLogger("lamamba.ops")

ENVIRONMENT_VARIABLE = "LAMAMBA_BACKEND"

_forced: list[str] = []
_logged: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Backend:
    """One implementation of an op, as a module that may not be importable here.

    The module has `forward`, `backward` and `refusal(x, state_size)`, which returns why it cannot take such inputs,
    or None. Only a missing module (ModuleNotFoundError) lets the automatic choice pass a back end over.
    """

    name: str
    module: str

    def load(self) -> Any:
        return importlib.import_module(self.module)

    def refusal(self, x: Tensor, state_size: int) -> str | None:
        """Why this back end cannot run such inputs here; None when it can."""
        try:
            module = self.load()
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        return module.refusal(x, state_size)


@dataclass(frozen=True)
class Op:
    """An op's name and its back ends, fastest first."""

    name: str
    backends: tuple[Backend, ...]
    _by_name: dict[str, Backend] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name.update({backend.name: backend for backend in self.backends})

    def get(self, name: str) -> Backend:
        """The back end of this name.

        Raises:
            ValueError: for an unknown name; the nearest known one is named.
        """
        if name not in self._by_name:
            raise unknown_name("back end", name, [*self._by_name, "auto"])
        return self._by_name[name]

    def choose(self, x: Tensor, state_size: int, requested: str | None = None) -> str:
        """The name of the back end that will run these inputs.

        Raises:
            ValueError: when the requested name is unknown.
            RuntimeError: when the requested back end cannot run these inputs here, with the reason.
        """
        source = "argument"
        if requested is None and _forced:
            requested, source = _forced[-1], "context manager"
        if requested is None and (value := os.environ.get(ENVIRONMENT_VARIABLE)):
            requested, source = value, f"environment variable {ENVIRONMENT_VARIABLE}"
        if requested is not None and requested != "auto":
            if x.device.type != "meta" and (reason := self.get(requested).refusal(x, state_size)):
                raise RuntimeError(f"{self.name}: back end {requested!r} ({source}) cannot run here: {reason}")
            return self.get(requested).name
        return self._choose_automatically(x, state_size)

    def _choose_automatically(self, x: Tensor, state_size: int) -> str:
        passed_over: list[str] = []
        for backend in self.backends:
            reason = backend.refusal(x, state_size)
            if reason is None:
                _log_once(self.name, backend.name, str(x.device.type), passed_over)
                return backend.name
            passed_over.append(f"{backend.name}: {reason}")
        raise RuntimeError(f"{self.name}: no back end can run here ({'; '.join(passed_over)})")


def _log_once(op: str, backend: str, device: str, passed_over: list[str]) -> None:
    if torch.compiler.is_compiling() or (op, backend, device) in _logged:
        return
    _logged.add((op, backend, device))
    reason = "; ".join(passed_over) or "the fastest one"
    logger.info("%s on %s uses back end %r (%s)", op, device, backend, reason)


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


