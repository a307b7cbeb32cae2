"""Pruned U-Nets as stock classes of diffusers: where a configuration can say what is left, or filled with zeros.

    all attentions of a stage           the type of block without attention
    mid_block                           mid_block_type = None; its attention and second resnet: "UNetMidBlock2D"
    transformer blocks                  fewer transformer_layers_per_block, as nested lists; the rest is renumbered

The middle block has as many transformer blocks as the first transformer of the last down block: both read one number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from lamamba.compression.pruned_unets import (
    UNet,
    filled,
    outermost,
    removed_units,
    stock_class,
    unit_kinds,
    whole_config,
)
from lamamba.config import check_known

ATTENTION_FREE = {
    "CrossAttnDownBlock2D": "DownBlock2D", "AttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D", "AttnUpBlock2D": "UpBlock2D",
}
"""Types of blocks that differ in their attentions alone."""


def stock_units(model: UNet) -> tuple[str, ...]:
    """The units that may go, in any number together, so that a stock configuration describes what is left."""
    whole = _whole(model)
    kinds, before = unit_kinds(whole), removed_units(model)
    found = []
    for name in unit_kinds(model):
        try:
            _configuration(whole, kinds, outermost([*before, name]))
        except ValueError:
            continue
        found.append(name)
    return tuple(found)


def stock_model(model: UNet, names: Iterable[str] = ()) -> UNet:
    """The network without units (and what it lacks already) as a stock class of diffusers, sharing its weights.

    Raises:
        ValueError: for an unknown unit, or one whose removal no stock configuration describes.
    """
    whole = _whole(model)
    kinds, gone = unit_kinds(whole), outermost([*removed_units(model), *names])
    for name in gone:
        check_known("unit", name, kinds)
    stock, weights = _on_meta(model, _configuration(whole, kinds, gone)), model.state_dict()
    return filled(stock, {new: weights[old] for new, old in _renumbered(weights, gone).items()}, model)


def zero_filled(model: UNet, names: Iterable[str]) -> UNet:
    """A stock network of full size that computes what the pruned network does: the last layer of each branch is zero.

    Raises:
        ValueError: for an unknown unit; for a network without some of its weights already; where zeros do not do it.
    """
    kinds = unit_kinds(model)
    if removed_units(model):
        raise ValueError("filling with zeros needs the whole network, not one without some of its units")
    weights = dict(model.state_dict())
    for name in names:
        check_known("unit", name, kinds)
        if kinds[name] == "mid" and model.config["mid_block_scale_factor"] != 1:
            raise ValueError("mid_block divides by its mid_block_scale_factor: filled with zeros, it is no identity")
        for path, module in model.get_submodule(name).named_modules(prefix=name):
            if (last := _last_layer(module)) is not None:
                for part in last[1].state_dict():
                    key = f"{path}.{last[0]}.{part}"
                    weights[key] = torch.zeros_like(weights[key])
    return filled(_on_meta(model, whole_config(model)), weights, model)


def _last_layer(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The layer whose zeros make a branch zero, with its path."""
    if isinstance(module, ResnetBlock2D):
        return "conv2", module.conv2
    if isinstance(module, Transformer2DModel):
        return "proj_out", module.proj_out
    if isinstance(module, Attention):
        return "to_out.0", module.to_out[0]
    if isinstance(module, FeedForward):
        number = max(number for number, layer in enumerate(module.net) if isinstance(layer, nn.Linear))
        return f"net.{number}", module.net[number]
    return None


def _whole(model: UNet) -> UNet:
    """The whole network, on the meta device where it is not the model itself."""
    return _on_meta(model, whole_config(model)) if removed_units(model) else model


def _on_meta(model: UNet, config: Mapping[str, Any]) -> UNet:
    """A stock network of the model's class on the meta device."""
    with torch.device("meta"):
        return stock_class(model)(**config)


def _is_gone(gone: Collection[str], path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in gone)


def _configuration(whole: UNet, kinds: Mapping[str, str], gone: Collection[str]) -> dict[str, Any]:
    """The stock configuration without units.

    Raises:
        ValueError: where there is none, with the unit.
    """
    config, left = whole_config(whole), set(gone)
    if "mid_block" in left:
        config["mid_block_type"] = None
        left.remove("mid_block")
    for stage in _stages(whole):
        attentions = [f"{stage}.attentions.{number}" for number in _attentions(whole, stage)]
        if attentions and not _is_gone(gone, stage) and all(_is_gone(gone, name) for name in attentions):
            said = _without_attention(whole, config, stage, left)
            left -= {f"{stage}.attentions", *attentions, *said}
    blocks = {name for name in left if kinds[name] == "block"}
    if left := left - blocks:
        name = sorted(left)[0]
        raise ValueError(
            f"no configuration of {stock_class(whole).__name__} leaves out {name} ({kinds[name]}) alone; keep to "
            "stock_units, or save the pruned class"
        )
    return {**config, **_layer_numbers(whole, gone, config)} if blocks else config


def _stages(whole: UNet) -> list[str]:
    ends = [f"{end}.{number}" for end in ("down_blocks", "up_blocks") for number in range(len(getattr(whole, end)))]
    return [*ends, *([] if whole.mid_block is None else ["mid_block"])]


def _attentions(whole: UNet, stage: str) -> range:
    attentions = getattr(whole.get_submodule(stage), "attentions", None) or ()
    return range(len(attentions) if all(module is not None for module in attentions) else 0)


def _without_attention(whole: UNet, config: dict[str, Any], stage: str, left: Collection[str]) -> set[str]:
    """Change the configuration of a stage to none; returns what else goes by it."""
    scales = {getattr(module, "rescale_output_factor", 1) for module in whole.get_submodule(f"{stage}.attentions")}
    end, _, number = stage.partition(".")
    if scales == {1} and stage == "mid_block":
        if "add_attention" in config:
            config["add_attention"] = False
            return set()
        if config["mid_block_type"] == "UNetMidBlock2DCrossAttn" and "mid_block.resnets.1" in left:
            config["mid_block_type"] = "UNetMidBlock2D"
            return {"mid_block.resnets.1"}
    elif scales == {1}:
        types = list(config[f"{end[:-1]}_types"])
        plain = config.get(f"{end.removesuffix('_blocks')}sample_type", "conv") == "conv"
        if types[int(number)] in ATTENTION_FREE and plain:
            types[int(number)] = ATTENTION_FREE[types[int(number)]]
            config[f"{end[:-1]}_types"] = tuple(types)
            return set()
    raise ValueError(f"no configuration of {stock_class(whole).__name__} leaves out the attentions of {stage} alone")


def _layer_numbers(whole: UNet, gone: Collection[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """transformer_layers_per_block with what is left of each transformer.

    Raises:
        ValueError: when middle block and last down block need different numbers.
    """
    def numbers(stage: str) -> list[int]:
        paths = [f"{stage}.attentions.{number}" for number in _attentions(whole, stage)]
        lengths = {path: len(getattr(whole.get_submodule(path), "transformer_blocks", ())) for path in paths}
        return [
            sum(not _is_gone(gone, f"{path}.transformer_blocks.{number}") for number in range(length))
            for path, length in lengths.items() if not _is_gone(gone, path)
        ]

    down = [numbers(f"down_blocks.{number}") for number in range(len(whole.down_blocks))]
    up = [numbers(f"up_blocks.{number}") for number in range(len(whole.up_blocks))]
    mid = numbers("mid_block") if config["mid_block_type"] == "UNetMidBlock2DCrossAttn" else []
    if mid and down[-1] and mid[0] != down[-1][0]:
        raise ValueError(
            f"mid_block would have {mid[0]} transformer blocks, the first transformer of the last down block "
            f"{down[-1][0]}: stock configurations have one number for both; remove the same, or the whole mid_block"
        )
    down[-1] = down[-1] or mid
    return {
        "transformer_layers_per_block": [each or 1 for each in down],
        "reverse_transformer_layers_per_block": [each or 1 for each in up],
    }


def _renumbered(weights: Iterable[str], gone: Collection[str]) -> dict[str, str]:
    """The name of every weight that is left, by its name among the blocks that are left."""
    found = {}
    for old in weights:
        before, _, rest = old.partition(".transformer_blocks.")
        if _is_gone(gone, old):
            continue
        new = old
        if rest:
            number, _, leaf = rest.partition(".")
            earlier = sum(not _is_gone(gone, f"{before}.transformer_blocks.{other}") for other in range(int(number)))
            new = f"{before}.transformer_blocks.{earlier}.{leaf}"
        found[new] = old
    return found
