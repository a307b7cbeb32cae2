"""Multiply-adds by kind and activation memory of a network, on the meta device: nothing is allocated or computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lamamba.benchmarking.private_torch import TorchDispatchMode, has_aliases, tree_flatten
from lamamba.config import UNetConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.ops.selective_scan import projection_multiply_adds, scan_operations

LAYER_NORM_OPERATIONS = 5
"""Per element, as the paper counts."""


@dataclass(frozen=True)
class Operations:
    """Operations of one image and one forward pass."""

    parameters: int
    matrix: int
    """Multiply-adds of matrix products and convolutions (linear layers, projections of the scan, attention)."""
    scan: int
    """Operations of the recurrences, 9 l (g c) n + l (g c) for each scan of l tokens, g directions, c channels."""
    layer_norm: int
    """Operations of layer norms, 5 per element."""

    @property
    def paper_total(self) -> int:
        """The "GFLOPs" of the paper's tables: the sum, with a multiply-add as one operation."""
        return self.matrix + self.scan + self.layer_norm


@dataclass(frozen=True)
class Cost(Operations):
    """Operations and memory of one image and one forward pass."""

    activation_bytes: int
    """Saved for the backward pass, without parameters, in float32."""


class _Counter(TorchDispatchMode):
    """Counts operations of products (by PyTorch's formulas), scans and layer norms.

    A network repeats its blocks, and computing on the meta device is slow Python: an operator that comes again with
    tensors of the same shapes is counted as before, and returns empty tensors like those of the first time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.scan = self.layer_norm = 0
        self._known: dict[Any, tuple[tuple[int, int, int], Callable[[], Any]]] = {}

    def operations(self, model: nn.Module) -> Operations:
        """What was counted in a forward pass of one image."""
        return Operations(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            matrix=self.products // 2, scan=self.scan, layer_norm=self.layer_norm,
        )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        key = (function, structure, *(
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves
        ))
        if (known := self._known.get(key)) is None:
            output = function(*args, **kwargs)
            counts = _counts(function.overloadpacket, args, kwargs, output)
            if not has_aliases(function) and (again := _like(output)) is not None:
                self._known[key] = counts, again
        else:
            counts, output = known[0], known[1]()
        self.products, self.scan, self.layer_norm = (
            a + b for a, b in zip((self.products, self.scan, self.layer_norm), counts, strict=True))
        return output


def _counts(operator: Any, args: Any, kwargs: Any, output: Any) -> tuple[int, int, int]:
    """Operations of products, scans and layer norms in a call."""
    if operator is torch.ops.lamamba.selective_scan:
        x, _, _, _, W_dt, _, A = args[:7]
        return 2 * projection_multiply_adds(x.shape, W_dt.shape), scan_operations(x.shape, A.shape), 0
    if operator is torch.ops.aten.native_layer_norm:
        return 0, 0, LAYER_NORM_OPERATIONS * args[0].numel()
    formula = flop_registry.get(operator)
    return (formula(*args, **kwargs, out_val=output) if formula else 0), 0, 0


def _like(output: Any) -> Callable[[], Any] | None:
    """A function that makes meta tensors like an operator's output; None where it is of another kind."""
    if isinstance(output, tuple | list):
        parts = [_like(each) for each in output]
        if None in parts:
            return None
        return lambda: type(output)(part() for part in parts if part)
    if not isinstance(output, Tensor) or not output.is_meta:
        return None
    shape, stride, dtype = output.shape, output.stride(), output.dtype
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def count(config: UNetConfig) -> Cost:
    """Cost of one image for a network of this configuration, at its input size."""
    model, inputs = on_meta(config)
    with _Counter() as counter:
        activation_bytes = saved_bytes(model, *inputs)
    return Cost(**asdict(counter.operations(model)), activation_bytes=activation_bytes)


def lamamba_operations(config: UNetConfig) -> Operations:
    """Operations of one image for a network of this configuration, at its input size."""
    model, inputs = on_meta(config)
    return operations(model, *inputs)


def on_meta(config: UNetConfig) -> tuple[LaMambaUNet, tuple[Tensor | None, ...]]:
    """A network on the meta device, and the inputs of its forward pass for one image."""
    with torch.device("meta"):
        model = LaMambaUNet(config)
        x = torch.empty(1, config.in_channels, *config.input_size)
        timestep = torch.empty(1)
        labels = torch.empty(1, dtype=torch.int64) if config.num_classes else None
    return nn.Module.to(model, "meta"), (x, timestep, labels)                   # diffusers' own imports for seconds


def operations(model: nn.Module, *inputs: Any, **more: Any) -> Operations:
    """Parameters and operations of a network.

    Args:
        model: on the meta device.
        inputs, more: of its forward pass, for one image.
    """
    with torch.no_grad(), _Counter() as counter:
        model(*inputs, **more)
    return counter.operations(model)


def shallow_share(config: UNetConfig) -> float:
    """Cost of a shallow pass (lamamba.models.deep_cache) as a share of a full pass's, all operations counted."""
    model, (x, *_) = on_meta(config)
    with torch.device("meta"):
        conditioning = torch.empty(1, model.condition_outputs)                  # computed ahead in both
        deep = torch.empty(1, *config.token_grid, config.width)
    full, shallow = (
        operations(model, x, None, conditioning=conditioning, deep_features=given).paper_total for given in (None, deep)
    )
    return shallow / full


def multiply_adds_by_module(model: nn.Module, *inputs: Any, **more: Any) -> dict[str, int]:
    """Multiply-adds of products and convolutions in a forward pass, by the path of each module; "" is the whole.

    Args:
        model: a network on the meta device.
        inputs, more: of its forward pass, for one image.
    """
    def projections(*shapes: Any, **kwargs: Any) -> int:
        return 2 * projection_multiply_adds(shapes[0], shapes[4])

    by_module = FlopCounterMode(display=False, custom_mapping={torch.ops.lamamba.selective_scan: projections})
    with torch.no_grad(), by_module as counter:
        model(*inputs, **more)
    counts = {name.partition(".")[2]: sum(by.values()) // 2 for name, by in counter.get_flop_counts().items()}
    return {**counts, "": counter.get_total_flops() // 2}


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes that autograd saves for the backward pass, each storage once, without parameters and buffers."""
    with saved_storages({address(tensor) for tensor in [*model.parameters(), *model.buffers()]}) as kept:
        output = model(*inputs)
    del output
    return sum(storage.nbytes() for storage in kept.values())


def address(tensor: Tensor) -> int:
    """Of the storage."""
    return tensor.untyped_storage()._cdata


@contextmanager
def saved_storages(own: Set[int]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd saves for the backward pass, by address, in the order of the layers, without own."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if address(tensor) not in own:
            kept.setdefault(address(tensor), tensor.untyped_storage())          # kept alive: its address stays unique
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
