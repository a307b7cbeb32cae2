"""The removable units of diffusers' U-Nets; see `lamamba.compression.pruned_unets` for what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.benchmarking.flops import multiply_adds_by_module
from lamamba.compression.pruned_unets import (
    Shortcut,
    UNet,
    pruned_class,
    pruned_model,
    removed_units,
    stand_ins,
    unit_kinds,
    whole_config,
)
from lamamba.compression.units import Removable, Unit

TOKENS = 77
"""Of a text, as CLIP's encoders give; the multiply-adds of cross-attention depend on it."""


class DiffusersUnits(Removable):
    """A UNet2DModel or UNet2DConditionModel as removable units, named by the paths of their modules."""

    model: UNet

    def __init__(self, model: UNet):
        self.model = model
        with torch.device("meta"):
            self._twin = pruned_class(model)(removed_units=removed_units(model), **whole_config(model))
        self._multiply_adds = multiply_adds_by_module(self._twin, **example_inputs(model.config))
        self.multiply_adds, self.parameters = self._multiply_adds[""], model.num_parameters()
        self.units = tuple(self._list(unit_kinds(model)))

    def _list(self, kinds: Mapping[str, str]) -> Iterator[Unit]:
        parents = {name: next((path for path in _around(name) if path in kinds), None) for name in kinds}
        costs = {name: sum(weight.numel() for weight in self.own_parameters(name)) for name in kinds}
        inside: dict[str | None, int] = {}
        for name, parent in parents.items():
            inside[parent] = inside.get(parent, 0) + costs[name]
        for name, kind in kinds.items():
            is_sum = kind in ("block", "attentions") or (
                kind == "mid" and self.model.config["mid_block_scale_factor"] == 1
            )
            yield Unit(
                name, kind, ".".join(name.split(".")[: 1 if name.startswith("mid_block") else 2]), parents[name],
                costs[name], self._saved(name), is_sum=is_sum and costs[name] == inside.get(name),
            )

    def _saved(self, name: str) -> int:
        """Multiply-adds of a unit."""
        left = stand_ins(self._twin, name)
        if any(isinstance(module, Shortcut) and module.resample is not None for module in left.values()):
            pruned = pruned_model(self._twin, [name])                           # resampled once, not twice
            return self.multiply_adds - multiply_adds_by_module(pruned, **example_inputs(self.model.config))[""]
        count = self._multiply_adds
        return sum(count.get(path, 0) - count.get(f"{path}.conv_shortcut", 0) for path in left)

    def bypass(self, name: str) -> list[tuple[nn.Module, Callable[..., Any]]]:
        return [(self.model.get_submodule(path), left.train(self.model.training).forward)
                for path, left in stand_ins(self.model, name).items()]

    def own_parameters(self, name: str) -> Sequence[Tensor]:
        left = stand_ins(self.model, name)
        stays = {id(parameter) for module in left.values() for parameter in module.parameters()}
        paths = [name] if isinstance(self.model.get_submodule(name), nn.ModuleList) else left
        return [
            parameter for path in paths for parameter in self.model.get_submodule(path).parameters()
            if id(parameter) not in stays
        ]

    def without(self, names: Iterable[str]) -> UNet:
        """A PrunedUNet2DModel or PrunedUNet2DConditionModel without units; weights are shared with the model.

        Raises:
            ValueError: for an unknown unit.
        """
        return pruned_model(self.model, self.canonical(names))


def _around(name: str) -> Iterator[str]:
    """The paths around a path, from the inside."""
    while name := name.rpartition(".")[0]:
        yield name


def example_inputs(config: Mapping[str, Any], device: str | torch.device = "meta") -> dict[str, Any]:
    """Arguments for a forward pass of one image by a U-Net of this configuration, at its size; empty tensors.

    Raises:
        ValueError: for a way of conditioning that is not known here.
    """
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(1, *shape, dtype=dtype, device=device)

    size = config["sample_size"] or 2 ** (len(config["block_out_channels"]) + 2)
    height, width = (size, size) if isinstance(size, int) else size
    inputs: dict[str, Any] = {"sample": empty(config["in_channels"], height, width), "timestep": empty()}
    kind, projected = config["class_embed_type"], config.get("projection_class_embeddings_input_dim") or 0
    if kind in ("projection", "simple_projection"):
        inputs["class_labels"] = empty(projected)
    elif kind == "identity":
        inputs["class_labels"] = empty(config["time_embedding_dim"] or 4 * config["block_out_channels"][0])
    elif kind == "timestep" or config["num_class_embeds"] is not None:
        inputs["class_labels"] = empty(dtype=torch.float32 if kind == "timestep" else torch.int64)
    if "cross_attention_dim" not in config:
        return inputs
    wide = config["cross_attention_dim"]
    wide = wide if isinstance(wide, int) else wide[0]
    inputs["encoder_hidden_states"] = empty(TOKENS, config["encoder_hid_dim"] or wide)
    added, times = config["addition_embed_type"], config["addition_time_embed_dim"]
    if added == "text_time":                                                    # SDXL: pooled text, sizes and crops
        inputs["added_cond_kwargs"] = {"text_embeds": empty(projected - times), "time_ids": empty(1)}
    elif added not in (None, "text") or config["encoder_hid_dim_type"] not in (None, "text_proj"):
        raise ValueError(
            f"addition_embed_type={added!r}, encoder_hid_dim_type={config['encoder_hid_dim_type']!r}: U-Nets "
            "conditioned by images are not supported; text (SD) and text_time (SDXL) are"
        )
    return inputs
