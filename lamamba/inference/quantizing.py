"""Eight-bit weights, with or without eight-bit activations, by torchao or by kernels of our own.

    int8            weights in int8, one scale for each output channel; products in the network's own precision
    int8-dynamic    activations, too, in int8 at every product, one scale for each token
    fp8             the same in float8_e4m3, on GPUs that multiply it, of networks in bfloat16

Quantised are the products of tokens: projections of scan and attention, MLPs, merging and expanding. What is sensitive
or has few rows stays: the condition's products (timestep embedding, condition and modulation of every block), the head,
and the scan's W_x and W_dt.

On CPUs with our compiled kernels, int8-dynamic is PyTorch's integer product between two of them: x to q and its scales
in one pass, the integers to y in another (`Int8Linear`). torchao's numbers, without its passes over the tokens.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamamba.models.blocks import ConditionLinear
from lamamba.ops import native
from lamamba.ops.layers import cpu
from lamamba.options.base import Quantization

if TYPE_CHECKING:
    from diffusers import TorchAoConfig

KEPT = ("timestep_embedding", "condition", "modulation", "head", "lora_A", "lora_B")
"""Names of modules that keep their precision, wherever they are; W_x and W_dt are no modules and stay anyway."""
FP8_CAPABILITY = (8, 9)
"""Of GPUs, from which on they multiply float8."""


def check_quantization(
    kind: Quantization, device: torch.device, dtype: torch.dtype = torch.float32, *, compiled: bool = False,
) -> None:
    """Check that a network on this device and in this dtype can be quantised.

    Raises:
        ValueError: for fp8 in another dtype than bfloat16, or on a device that does not multiply it.
        RuntimeError: without torchao, where it is needed, with what to install.
    """
    if kind == "fp8":
        _check_fp8(device, dtype)
    if not _has_kernels(kind, device, dtype, compiled):
        _check_torchao()


def _check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < FP8_CAPABILITY:
        found = device.type
        if device.type == "cuda":
            found = "{} of {}.{}".format(torch.cuda.get_device_name(device), *capability)
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), not {found}: take "
            "int8-dynamic"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"fp8 products end in bfloat16, the network is in {name}: give dtype bfloat16, too")


def _check_torchao() -> None:
    if importlib.util.find_spec("torchao") is None:
        raise RuntimeError("weights of eight bits need torchao: pip install 'lamamba-diff[quantize]'")


def _settings(kind: Quantization) -> Any:
    _check_torchao()
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    if kind == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return Int8WeightOnlyConfig() if kind == "int8" else Int8DynamicActivationInt8WeightConfig()


def quantization_config(kind: Quantization) -> TorchAoConfig:
    """What `LaMambaUNet.from_pretrained(folder, quantization_config=...)` takes.

    Raises:
        RuntimeError: without torchao.
    """
    from diffusers import TorchAoConfig

    return TorchAoConfig(_settings(kind), modules_to_not_convert=list(KEPT))


class Int8Linear(nn.Module):
    """A Linear layer for inference on CPUs, y = (q w^T) s_x s_w + b with q and w in int8.

    x = q s_x with a scale for each token, weight = w s_w with one for each output channel: symmetric, the largest value
    is 127.
    """

    weight: Tensor
    """(in, out) int8."""
    scale: Tensor
    """(out,)"""
    bias: Tensor
    """(out,)"""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        w, scale = cpu.quantize_rows(linear.weight.detach())
        self.register_buffer("weight", w.T.contiguous())
        self.register_buffer("scale", scale.flatten())
        bias = torch.zeros(self.out_features) if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        q, scale = cpu.quantize_rows(x.reshape(-1, self.in_features))
        y = cpu.scale_products(torch._int_mm(q, self.weight), scale, self.scale, self.bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, *args: object) -> None:
        raise RuntimeError("a network with int8 products for this CPU cannot be saved: see quantization_config")


@functools.cache
def _has_int8_products() -> bool:
    """Whether this build of torch and this installation have what `Int8Linear` needs."""
    if native.load() is None:
        return False
    try:
        return bool(Int8Linear(nn.Linear(32, 32))(torch.ones(32, 32)).isfinite().all())
    except (AttributeError, RuntimeError):
        return False


def _has_kernels(kind: Quantization, device: torch.device, dtype: torch.dtype, compiled: bool) -> bool:
    """Whether `Int8Linear` runs; torch.compile fuses torchao's operations itself."""
    fits = kind == "int8-dynamic" and device.type == "cpu" and dtype in cpu.DTYPES and not compiled
    return fits and _has_int8_products()


def quantize(network: nn.Module, kind: Quantization, *, compiled: bool = False) -> None:
    """Quantise a network in place, for inference.

    Args:
        network: on the device and in the dtype in which it will run.
        kind: of the numbers.
        compiled: whether torch.compile follows.

    Raises:
        RuntimeError: without torchao, where it is needed.
    """
    weight = next(network.parameters())
    if _has_kernels(kind, weight.device, weight.dtype, compiled):
        for name, module in list(network.named_modules()):
            if is_quantized(module, name):
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, Int8Linear(module))
                module.weight = None                                            # freed at once
        return
    settings = _settings(kind)
    from torchao.quantization import quantize_

    quantize_(network, settings, filter_fn=is_quantized)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a module of a network, by this path, gets weights of eight bits."""
    return (
        isinstance(module, nn.Linear) and not isinstance(module, ConditionLinear)
        and not any(part in KEPT for part in name.split("."))
    )
