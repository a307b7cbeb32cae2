"""U-Nets of diffusers without some of their units.

A unit is named by the path of its module: "down_blocks.0.resnets.1", "mid_block", "up_blocks.1.attentions.0",
"up_blocks.1.attentions.0.transformer_blocks.2.attn1". In the place of a removed module stands what is left of it.

    resnet                              y = shortcut(x) / scale: resampling and 1 x 1 convolution stay
    transformer, block, mid             y = x
    attention of a UNet2DModel          y = x / scale
    attn1, attn2, ff of a block         0, which the block adds to x; its norm goes, too

Stock classes fill what a file lacks with random numbers. So that they refuse a pruned folder instead, a single zero
takes the place of one weight of each removed unit: its shape does not fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models import ModelMixin
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from lamamba.config import check_known

__all__ = ["ModelMixin", "PrunedUNet2DConditionModel", "PrunedUNet2DModel"]     # pipelines look for ModelMixin here
UNet: TypeAlias = UNet2DModel | UNet2DConditionModel
NORMS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}
"""The norm before each branch of a BasicTransformerBlock."""


class Shortcut(nn.Module):
    """What is left of a ResnetBlock2D without its residual branch."""

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        self.resample = block.upsample or block.downsample
        self.conv_shortcut = block.conv_shortcut
        self.scale = block.output_scale_factor

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        if self.resample is not None:
            x = self.resample(x)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)      # as ResnetBlock2D
        return x / self.scale


class Skip(nn.Module):
    """What is left of a module around which a residual lies: x / scale."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, *_: Any, return_dict: bool | None = None, **__: Any) -> Tensor | tuple[Tensor]:
        x = x / self.scale if self.scale != 1 else x
        return x if return_dict is None else (x,)                               # a Transformer2DModel returns a tuple


class Zero(nn.Module):
    """What is left of a branch whose output is added to x."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_zeros(1).expand_as(x)


def unit_kinds(model: UNet) -> dict[str, str]:
    """The kind of every unit by its path; a unit stands before those inside it."""
    stages = {name: getattr(model, name) for name in ("down_blocks", "mid_block", "up_blocks")}
    return {
        name: kind for stage, modules in stages.items() if modules is not None
        for name, module in modules.named_modules(prefix=stage) if (kind := _kind(name, module)) is not None
    }


def _kind(name: str, module: nn.Module) -> str | None:
    leaf = name.rpartition(".")[2]
    if name == "mid_block":
        return None if isinstance(module, Skip) else "mid"
    if leaf == "attentions" and isinstance(module, nn.ModuleList) and len(module) > 1:
        return "attentions" if all(_kind(f"{name}.0", child) for child in module) else None
    if isinstance(module, ResnetBlock2D):
        return "resnet" if module.use_in_shortcut or module.in_channels == module.out_channels else None
    if isinstance(module, Transformer2DModel):
        return "transformer"
    if isinstance(module, BasicTransformerBlock):
        return "block"
    if isinstance(module, FeedForward):
        return "feed-forward"
    if not isinstance(module, Attention):
        return None
    if leaf in NORMS:
        return "cross-attention" if module.is_cross_attention else "self-attention"
    return "attention" if module.residual_connection else None


def stand_ins(model: UNet, name: str) -> dict[str, nn.Module]:
    """What is left of each module of a unit, by its path; parameters are shared with the model."""
    module, (around, _, leaf) = model.get_submodule(name), name.rpartition(".")
    if isinstance(module, nn.ModuleList):
        return {f"{name}.{number}": stand_ins(model, f"{name}.{number}")[f"{name}.{number}"]
                for number in range(len(module))}
    if isinstance(module, ResnetBlock2D):
        return {name: Shortcut(module)}
    if leaf in NORMS:
        return {name: Zero(), f"{around}.{NORMS[leaf]}": nn.Identity()}
    return {name: Skip(module.rescale_output_factor if isinstance(module, Attention) else 1.0)}


def _mark(stand_in: nn.Module, module: nn.Module) -> None:
    """Put a zero in the place of a weight of the module, by which stock classes refuse the file."""
    kept = stand_in.state_dict()
    *path, leaf = next(
        name for name, weight in module.state_dict().items() if name not in kept and weight.dim() > 1
    ).split(".")
    for part in path:
        inner = nn.Module()
        stand_in.add_module(part, inner)
        stand_in = inner
    stand_in.register_buffer(leaf, torch.zeros(1))


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """Names without those that lie inside others, sorted."""
    names = sorted(set(names))
    return tuple(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def _remove(model: UNet, names: Iterable[str]) -> None:
    known = unit_kinds(model)
    for name in (chosen := outermost(names)):
        check_known("removed_units: unit", name, known)
        for path, stand_in in stand_ins(model, name).items():
            if not isinstance(stand_in, nn.Identity):
                _mark(stand_in, model.get_submodule(path))
            around, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(around), leaf, stand_in)
    model.register_to_config(removed_units=chosen)


def _as_in(base: type) -> Any:
    """Give a constructor the parameters of its base class, by which diffusers reads configurations."""
    signature = inspect.signature(base.__init__)                                # type: ignore[misc]
    removed = inspect.Parameter("removed_units", inspect.Parameter.KEYWORD_ONLY, default=())

    def change(init: Any) -> Any:
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), removed])
        return init

    return change


class PrunedUNet2DModel(UNet2DModel):
    """A UNet2DModel without some of its units.

    Args:
        removed_units: their names.
        config: of the whole network, as for UNet2DModel.

    Raises:
        ValueError: for an unknown unit.
    """

    @_as_in(UNet2DModel)
    def __init__(self, *, removed_units: Sequence[str] = (), **config: Any):
        super().__init__(**config)
        _remove(self, removed_units)


class PrunedUNet2DConditionModel(UNet2DConditionModel):
    """A UNet2DConditionModel without some of its units; arguments as for PrunedUNet2DModel."""

    @_as_in(UNet2DConditionModel)
    def __init__(self, *, removed_units: Sequence[str] = (), **config: Any):
        super().__init__(**config)
        _remove(self, removed_units)


def removed_units(model: UNet) -> tuple[str, ...]:
    """Of a pruned network; none of a whole one."""
    return tuple(model.config.get("removed_units", ()))


def whole_config(model: UNet) -> dict[str, Any]:
    """The constructor's arguments for the whole network."""
    defaults = inspect.signature(stock_class(model).__init__).parameters
    return {name: model.config[name] for name in defaults if name in model.config}


def stock_class(model: UNet) -> type[UNet]:
    return UNet2DConditionModel if isinstance(model, UNet2DConditionModel) else UNet2DModel


def pruned_class(model: UNet) -> type[UNet]:
    """The class of a network like this one without some of its units."""
    return PrunedUNet2DConditionModel if isinstance(model, UNet2DConditionModel) else PrunedUNet2DModel


def pruned_model(model: UNet, names: Iterable[str]) -> UNet:
    """The network without units, with the weights of the rest, which it shares with the model.

    Raises:
        ValueError: for an unknown unit, or when the weights are not those of the configuration.
    """
    known = unit_kinds(model)
    for name in (names := tuple(names)):
        check_known("unit", name, known)
    with torch.device("meta"):
        pruned = pruned_class(model)(removed_units=outermost([*removed_units(model), *names]), **whole_config(model))
    marks = {
        f"{path}.{name}": torch.zeros(1, dtype=model.dtype, device=model.device)
        for path, module in pruned.named_modules() if isinstance(module, Shortcut | Skip | Zero)
        for name, _ in module.named_buffers()
    }
    return filled(pruned, {**model.state_dict(), **marks}, model)


def filled(pruned: UNet, weights: Mapping[str, Tensor], model: UNet) -> UNet:
    """Give a network on the meta device its weights by name, in the mode of the model that they come from."""
    names = pruned.state_dict().keys()
    if missing := sorted(names - weights.keys()):
        raise ValueError(
            f"the network has no {missing[0]} (and {len(missing) - 1} more): its modules are not those of its "
            "configuration; unload or fuse adapters first"
        )
    pruned.load_state_dict({name: weights[name] for name in names}, assign=True)
    return pruned.train(model.training)
