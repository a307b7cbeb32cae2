"""Eight-bit weights by torchao, with or without eight-bit activations.

    int8            weights in int8, one scale for each output channel; products in the network's own precision
    int8-dynamic    activations, too, in int8 at every product, one scale for each token

Quantised are the products of tokens: projections of scan and attention, MLPs, merging and expanding. What is sensitive
or has few rows stays: the condition's products (timestep embedding, condition and modulation of every block), the head,
and the scan's W_x and W_dt.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lamamba.models.blocks import ConditionLinear

if TYPE_CHECKING:
    from diffusers import TorchAoConfig

Quantization = Literal["int8", "int8-dynamic"]
KEPT = ("timestep_embedding", "condition", "modulation", "head", "lora_A", "lora_B")
"""Names of modules that keep their precision, wherever they are; W_x and W_dt are no modules and stay anyway."""


def check_quantization() -> None:
    """Check that torchao is installed.

    Raises:
        RuntimeError: with what to install.
    """
    if importlib.util.find_spec("torchao") is None:
        raise RuntimeError("weights of eight bits need torchao: pip install 'lamamba-diff[quantize]'")


def _settings(kind: Quantization) -> Any:
    check_quantization()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return {"int8": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}[kind]()


def quantization_config(kind: Quantization) -> TorchAoConfig:
    """What `LaMambaUNet.from_pretrained(folder, quantization_config=...)` takes.

    Raises:
        RuntimeError: without torchao.
    """
    from diffusers import TorchAoConfig

    return TorchAoConfig(_settings(kind), modules_to_not_convert=list(KEPT))


def quantize(network: nn.Module, kind: Quantization) -> None:
    """Quantise a network in place, for inference.

    Raises:
        RuntimeError: without torchao.
    """
    settings = _settings(kind)
    from torchao.quantization import quantize_

    quantize_(network, settings, filter_fn=is_quantized)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a module of a network, by this path, gets weights of eight bits."""
    return (
        isinstance(module, nn.Linear) and not isinstance(module, ConditionLinear)
        and not any(part in KEPT for part in name.split("."))
    )
