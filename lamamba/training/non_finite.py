"""Losses and gradients that are not finite: the samples and the module where they began, as a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.utils.distributed import local


def is_finite(value: Any) -> bool:
    """Whether every floating-point number in a tensor, or in the tensors of a tuple or list, is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(local(value.detach()).isfinite().all())
    return all(is_finite(part) for part in value) if isinstance(value, tuple | list) else True


def find_origin(
    network: nn.Module, losses: Callable[[], Tensor], agree: Callable[[bool], bool] = bool
) -> tuple[str | None, list[int]]:
    """Run a batch again with hooks on every module, to find the first output or gradient that is not finite.

    Args:
        network: gets hooks; its gradients are overwritten.
        losses: runs the network on the batch and gives each sample's loss, (b,).
        agree: whether the condition holds on any rank, where the backward pass is a collective.

    Returns:
        A phrase that names the innermost module and the direction ("forward" or "backward"), or None when all is
        finite this time; and the samples (by their row) whose own loss is not finite.
    """
    found: list[str] = []

    def after_forward(name: str) -> Callable[..., None]:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not is_finite(output):                             # inner modules are done before outer
                verb = "made from finite inputs" if is_finite(inputs) else "given"
                own = [key for key, p in module.named_parameters(recurse=False) if not is_finite(p)]
                cause = f", whose {own[0]} is not finite" if own else ""
                found.append(f"forward pass of {name} ({type(module).__name__}){cause}: {verb}")
        return check

    def after_backward(name: str) -> Callable[..., None]:
        def check(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            if not found and is_finite(grad_output) and not is_finite(grad_input):
                found.append(f"backward pass of {name} ({type(module).__name__}): made from finite gradients")
        return check

    def after_gradient(name: str) -> Callable[..., None]:
        def check(gradient: Tensor) -> None:
            if not found and not is_finite(gradient):
                found.append(f"gradient of {name}: made in the backward pass")
        return check

    handles = []
    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_hook(after_forward(name)))
            handles.append(module.register_full_backward_hook(after_backward(name)))
    handles += [p.register_hook(after_gradient(name)) for name, p in network.named_parameters() if p.requires_grad]
    compiled, network._compiled_call_impl = getattr(network, "_compiled_call_impl", None), None
    try:
        values = losses()
        rows = [row for row, value in enumerate(values.tolist()) if not torch.isfinite(torch.tensor(value))]
        if not found and rows:
            found.append("loss itself: made from a finite output")
        if not agree(bool(found)):
            values.mean().backward()
    finally:
        network._compiled_call_impl = compiled
        for handle in handles:
            handle.remove()
        network.zero_grad(set_to_none=True)
    return (found[0] if found else None), rows
