"""Weights, configuration and optimizer state of official LaMamba-Diff checkpoints, under our parameter names.

An official training checkpoint is a pickle of {"model", "ema", "opt", "args", "config"}. It is read by
torch.load(weights_only=True), which executes nothing: tensors, plain values, an argparse.Namespace and a yacs CfgNode
(as an ordered dict) are allowed, everything else is an error.
"""

from __future__ import annotations

import argparse
import collections
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lamamba.config import NUM_STAGES, STAGE_SCALES, UNetConfig
from lamamba.models.geometry import attention_mask, relative_positions
from lamamba.models.unet import LaMambaUNet
from lamamba.utils.tensors import check_finite, read_pickle

_RENAMES = [
    (r"^position_embedding$", "pos_embed"),
    (r"^patch_embedding\.projection\.", "patch_embed.proj."),
    (r"^patch_embedding\.norm\.", "patch_embed.norm."),
    (r"^timestep_embedding\.linear_in\.", "t_embedder.mlp.0."),
    (r"^timestep_embedding\.linear_out\.", "t_embedder.mlp.2."),
    (r"^label_embedding\.", "y_embedder.embedding_table."),
    (r"^head\.expand\.linear\.", "final_up.expand."),
    (r"^head\.expand\.norm\.", "final_up.norm."),
    (r"^head\.condition\.", "final_condition_projection."),
    (r"^head\.modulation\.", "final_adaLN_modulation.1."),
    (r"^head\.linear\.", "final_linear."),
    (r"^merges\.(\d)\.norm\.", r"layers.\1.downsample.norm."),
    (r"^merges\.(\d)\.linear\.", r"layers.\1.downsample.reduction."),
    (r"^expands\.0\.", "layers_up.2.upsample."),
    (r"^expands\.1\.", "layers_up.3.upsample."),
    (r"\.upsample\.linear\.", ".upsample.expand."),
    (r"^encoder\.", "layers."),
    (r"^bottleneck\.", "mid_layer."),
    (r"^decoder\.", "layers_up."),
    (r"(blocks\.\d+)\.condition\.", r"\1.condition_projection."),
    (r"(blocks\.\d+)\.modulation\.", r"\1.adaLN_modulation.1."),
    (r"\.norms\.scan\.", ".norm."),
    (r"\.norms\.attention\.", ".norm_swin."),
    (r"\.norms\.mlp\.", ".norm2."),
    (r"\.branches\.scan\.", ".op."),
    (r"\.branches\.attention\.", ".attn."),
    (r"\.branches\.mlp\.linear_in\.", ".mlp.fc1."),
    (r"\.branches\.mlp\.linear_out\.", ".mlp.fc2."),
    (r"\.op\.conv\.", ".op.conv2d."),
    (r"\.op\.W_x$", ".op.x_proj_weight"),
    (r"\.op\.W_dt$", ".op.dt_projs_weight"),
    (r"\.op\.b_dt$", ".op.dt_projs_bias"),
    (r"\.op\.A_log$", ".op.A_logs"),
    (r"\.op\.D$", ".op.Ds"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.bias_table$", ".attn.relative_position_bias_table"),
]


def official_name(name: str) -> str:
    """The official code's name of one of our parameters."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _official_shape(name: str, shape: torch.Size) -> tuple[int, ...]:
    if name == "position_embedding":
        return (1, *shape)
    if name.endswith((".scan.A_log", ".scan.D")):
        return (shape[0] * shape[1], *shape[2:])
    return tuple(shape)


def _official_buffers(config: UNetConfig) -> dict[str, Tensor]:
    """Buffers in the official state dict: relative position indices and attention masks."""
    buffers = {}
    stages = [(f"layers.{s}", s, config.depths[s]) for s in range(NUM_STAGES)]
    stages += [("mid_layer", NUM_STAGES - 1, config.bottleneck_depth)]
    stages += [(f"layers_up.{s}", NUM_STAGES - 1 - s, config.decoder_depths[s]) for s in range(NUM_STAGES)]
    for name, stage, depth in stages:
        scale = STAGE_SCALES[stage]
        grid = (config.token_grid[0] // scale, config.token_grid[1] // scale)
        window = config.stage_window(stage)
        for i in range(depth):
            prefix = f"{name}.blocks.{i}"
            buffers[f"{prefix}.attn.relative_position_index"] = relative_positions(window)
            if i % 2 == 1 and grid[0] > window[0]:
                mask = attention_mask(grid, window, (window[0] // 2, window[1] // 2))
                assert mask is not None
                buffers[f"{prefix}.attn_mask"] = torch.where(mask, 0.0, -100.0)
    return buffers


def to_official(model: LaMambaUNet) -> dict[str, Tensor]:
    """State dict of a model under the official names, with the buffers that the official strict loading expects.

    Raises:
        ValueError: for what the official code cannot express: flow, removed blocks, a grid that is not square.
    """
    config = model.architecture
    if config.objective != "noise" or config.removed_blocks or config.token_grid[0] != config.token_grid[1]:
        raise ValueError(
            f"the official format holds objective='noise', no removed_blocks and a square grid; this model has "
            f"objective={config.objective!r}, removed_blocks={config.removed_blocks} and grid={config.token_grid}: "
            "keep our own format"
        )
    state = {
        official_name(name): tensor.detach().reshape(_official_shape(name, tensor.shape)).clone()
        for name, tensor in model.named_parameters()
    }
    return state | _official_buffers(config)


def derive_config(state: Mapping[str, Tensor], scan: Literal["continuous", "cross"] = "continuous") -> UNetConfig:
    """Derive the configuration from the names and shapes of official weights; the scan kind is not among them.

    Raises:
        ValueError: when the tensors are not those of a LaMamba-Diff network.
    """
    def need(name: str, dimensions: int) -> torch.Size:
        if name not in state:
            raise ValueError(f"no tensor {name!r}: these are not the weights of an official LaMamba-Diff network")
        if state[name].dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, and {dimensions} dimensions fit")
        return state[name].shape

    def count(pattern: str) -> int:
        found = {match[1] for key in state if (match := re.match(pattern, key))}
        if found != {str(number) for number in range(len(found))}:
            odd = min(found - {str(number) for number in range(len(found))})
            raise ValueError(f"{len(found)} blocks match {pattern!r}, one numbered {odd[:20]}: some are missing")
        return len(found)

    _, height, grid_width, width = need("pos_embed", 4)
    tables = {key: tensor.shape for key, tensor in state.items() if key.endswith("relative_position_bias_table")}
    table = need("layers.0.blocks.0.attn.relative_position_bias_table", 2)
    if len({shape[-1:] for shape in tables.values()}) > 1:
        raise ValueError("the bias tables have different numbers of heads in different stages, which is not supported")
    scan_width = need("layers.0.blocks.0.op.out_proj.weight", 2)[1]
    projection = need("patch_embed.proj.weight", 4)
    return UNetConfig(
        width=width, num_heads=table[1],
        depths=tuple(count(rf"layers\.{s}\.blocks\.(\d+)\.") for s in range(NUM_STAGES)),
        bottleneck_depth=count(r"mid_layer\.blocks\.(\d+)\."), window_size=(math.isqrt(table[0]) + 1) // 2,
        state_size=need("layers.0.blocks.0.op.A_logs", 2)[1], ssm_ratio=scan_width / max(width, 1),
        mlp_ratio=need("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / max(width, 1), patch_size=projection[2],
        in_channels=projection[1], num_classes=need("y_embedder.embedding_table.weight", 2)[0] - 1,
        grid=(height, grid_width), scan=scan,
    )


def read_official(path: str | Path) -> dict[str, Any]:
    """Read an official checkpoint or bare state dict (.pt) without executing anything from it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is truncated, not a checkpoint, or holds objects other than those above.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give an official checkpoint (.pt)")
    return read_pickle(path, (argparse.Namespace, (collections.OrderedDict, "yacs.config.CfgNode")))


def _weights(content: Mapping[str, Any], weights: str) -> Mapping[str, Tensor]:
    if "ema" not in content and "model" not in content:
        state: Any = content
    elif weights in content:
        state = content[weights]
    else:
        raise ValueError(f"the checkpoint has no {weights!r} weights, only {', '.join(map(str, content))}")
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"this is not an official checkpoint: {weights!r} is not a dict of tensors by name")
    storages = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(f"this is not an official checkpoint: {key} is not a tensor with values")
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > sum(storages.values()):
        raise ValueError("this is not an official checkpoint: its tensors are larger than what is stored of them")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state


def _scan_kind(content: Mapping[str, Any]) -> Literal["continuous", "cross"] | None:
    try:
        return "continuous" if content["config"]["MODEL"]["VSSM"]["CONTINUOUS_SCAN"] else "cross"
    except (KeyError, TypeError):
        return None


def load_official(
    source: str | Path | Mapping[str, Any],
    config: UNetConfig | None = None,
    *,
    weights: Literal["ema", "model"] | None = None,
) -> LaMambaUNet:
    """Load an official checkpoint as a LaMambaUNet in evaluation mode.

    Args:
        source: a .pt file, its content, or a bare state dict with the official names.
        config: the architecture; by default derived from the tensors' shapes and the file's own configuration. The
            scan kind of a bare state dict cannot be known: "continuous" is assumed, with a warning.
        weights: "ema" or "model"; by default EMA where the file has it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming every missing, unexpected and reshaped tensor, or why the file cannot be read.
    """
    if isinstance(source, str | Path):
        try:
            return load_official(read_official(source), config, weights=weights)
        except ValueError as error:
            raise ValueError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    content = source
    if weights is None:
        weights = "model" if "model" in content and "ema" not in content else "ema"
    state = _weights(content, weights)
    if config is None:
        scan = _scan_kind(content)
        if scan is None:
            scan = "continuous"
            warnings.warn(
                "the scan kind cannot be known from these weights: assuming scan='continuous' as in the paper; "
                "pass a config to say otherwise", UserWarning, stacklevel=2,
            )
        config = derive_config(state, scan)
    with torch.device("meta"):                                                  # nothing is allocated of wrong sizes
        model = LaMambaUNet(config)
    _load_strictly(model, state)
    check_finite(model, "the official weights")
    return model.eval()


def official_optimizer(content: Mapping[str, Any], model: LaMambaUNet) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """AdamW's state from an official training checkpoint, under our parameter names.

    The file numbers parameters in the order of its weights, buffers not counted.

    Returns:
        "exp_avg/NAME", "exp_avg_sq/NAME" and "step/NAME" tensors; the number of optimizer steps (the official script
        itself counts micro-batches); and the settings of the parameter group.

    Raises:
        ValueError: when there is no such state, or it does not fit the weights.
    """
    ours = {official_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    order = [key for key in _weights(content, "model") if key in ours]
    try:
        states, (group,) = content["opt"]["state"], content["opt"]["param_groups"]
        numbers, settings = list(group["params"]), {key: value for key, value in group.items() if key != "params"}
        kept = [(states[k]["exp_avg"], states[k]["exp_avg_sq"], float(states[k]["step"])) for k in numbers]
        if not all(isinstance(moment, Tensor) and moment.is_floating_point() for *two, _ in kept for moment in two):
            raise TypeError("its moments are no tensors")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint's optimizer is no AdamW over one group of parameters ({error})") from error
    if len(numbers) != len(order) or set(states) != set(numbers):
        raise ValueError(
            f"the checkpoint's optimizer has states of {len(states)} of {len(numbers)} parameters, the network has "
            f"{len(order)}: they do not belong together"
        )
    tensors: dict[str, Tensor] = {}
    for (*moments, step), key in zip(kept, order, strict=True):
        name, parameter = ours[key]
        for kind, value in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            if tuple(value.shape) != _official_shape(name, parameter.shape):
                raise ValueError(f"{kind} of {key} has shape {tuple(value.shape)}, which is not its parameter's")
            tensors[f"{kind}/{name}"] = value.reshape(parameter.shape).clone()
        tensors[f"step/{name}"] = torch.tensor(step, dtype=torch.float32)
    steps = {int(value) for name, value in tensors.items() if name.startswith("step/")}
    if len(steps) != 1:
        raise ValueError(f"the checkpoint's parameters have made different numbers of steps: {sorted(steps)}")
    return tensors, steps.pop(), settings


def _load_strictly(model: LaMambaUNet, state: Mapping[str, Tensor]) -> None:
    """Give a network on the meta device its weights, in memory of their own."""
    parameters = {official_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    expected = {key: _official_shape(name, parameter.shape) for key, (name, parameter) in parameters.items()}
    faults = [f"missing {key}" for key in expected if key not in state]
    faults += [
        f"{key} has shape {tuple(state[key].shape)}, the configuration needs {shape}"
        for key, shape in expected.items() if key in state and tuple(state[key].shape) != shape
    ]
    faults += [
        f"{key} holds {state[key].dtype}, not floating-point numbers"
        for key in expected if key in state and not state[key].is_floating_point()
    ]
    buffers = {} if faults else _official_buffers(model.architecture)
    faults += [f"unexpected {key}" for key in state if key not in expected and key not in buffers and not faults]
    faults += [
        f"{key} is not the table that this grid and window imply"
        for key, table in buffers.items()
        if key in state and not torch.equal(state[key].to(table.dtype), table)
    ]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ValueError(f"the official weights do not fit the configuration: {shown}")
    model.load_state_dict(
        {name: state[key].reshape(parameter.shape).to(torch.float32, copy=True)
         for key, (name, parameter) in parameters.items()}, assign=True,
    )
    model.set_grid(None)                                                        # its tables are on meta
