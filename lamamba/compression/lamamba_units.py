"""The removable units of LaMamba networks: branches, blocks, and the bottleneck with the residual around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamamba.benchmarking.flops import multiply_adds_by_module, on_meta
from lamamba.compression.units import Removable, Unit
from lamamba.config import STAGES
from lamamba.models.blocks import LaMambaBlock
from lamamba.models.unet import LaMambaUNet


class LaMambaUnits(Removable):
    """A LaMamba network as removable units, named as in its configuration's removed_blocks."""

    model: LaMambaUNet

    def __init__(self, model: LaMambaUNet):
        model.check_plain("removing layers")
        self.model = model
        stages: list[Any] = [*model.encoder, model.bottleneck, *model.decoder]
        self._stages = dict(zip(STAGES, stages, strict=True))
        same, inputs = on_meta(model.architecture)
        self._multiply_adds = multiply_adds_by_module(same, *inputs)
        self.multiply_adds, self.parameters = self._multiply_adds[""], model.num_parameters()
        self.units = tuple(self._list())

    def _list(self) -> Iterator[Unit]:
        for name, stage in self._stages.items():
            blocks = {f"{name}.{number}": block for number, block in stage.blocks.items()}
            units = [unit for block in blocks for unit in self._of_block(block, blocks[block], name)]
            if name == "bottleneck" and blocks:
                whole = [unit for unit in units if unit.kind == "block"]
                yield Unit(
                    name, "bottleneck", name, None, sum(unit.parameters for unit in whole),
                    sum(unit.multiply_adds for unit in whole),
                )
            yield from units

    def _of_block(self, name: str, block: LaMambaBlock, group: str) -> Iterator[Unit]:
        path = ".blocks.".join(name.rsplit(".", 1))
        share = block.modulation.out_features // len(block.branches)            # rows of shift, scale and gate
        branches = [
            Unit(
                f"{name}.{branch}", branch, group, name,
                _count(module) + _count(block.norms[branch]) + share * (block.modulation.in_features + 1),
                self._multiply_adds[f"{path}.branches.{branch}"] + share * block.modulation.in_features,
            )
            for branch, module in block.branches.items()
        ]
        yield Unit(
            name, "block", group, "bottleneck" if group == "bottleneck" else None, _count(block),
            self._multiply_adds[path], is_sum=True,
        )
        yield from branches

    def _block(self, name: str) -> tuple[LaMambaBlock, str | None]:
        """The block of a unit's name, and its branch."""
        for group, stage in self._stages.items():
            number, _, branch = name.removeprefix(group + ".").partition(".")
            if name.startswith(group + ".") and number in stage.blocks:
                return stage.blocks[number], branch or None
        raise AssertionError(name)

    def bypass(self, name: str) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        if name == "bottleneck":                                                # x + 0: its residual goes, too
            return [(self.model.bottleneck, lambda x, *_: torch.zeros_like(x))]
        block, branch = self._block(name)
        if branch is None:
            return [(block, lambda x, *_: x)]
        return [(block.branches[branch], lambda x, *_: torch.zeros_like(x))]

    def own_parameters(self, name: str) -> Sequence[Tensor]:
        if name == "bottleneck":
            return list(self.model.bottleneck.parameters())
        block, branch = self._block(name)
        return list((block if branch is None else block.branches[branch]).parameters())

    def without(self, names: Iterable[str]) -> LaMambaUNet:
        """A network without units: branches go with their rows of the modulation, weights are shared with the model.

        Raises:
            ValueError: for an unknown unit.
        """
        config = self.model.architecture
        removed = {*config.removed_blocks, *self.canonical(names)}
        names = [name for name in removed if not any(name.startswith(f"{other}.") for other in removed)]
        config = config.replace(removed_blocks=tuple(names))
        with torch.device("meta"):
            pruned = LaMambaUNet(config)
        weights = self.model.state_dict()
        kept = {name: weights[name] for name in pruned.state_dict()}
        for name, stage in self._stages.items():
            for number, block in stage.blocks.items():
                left = config.branches(f"{name}.{number}")
                if left and len(left) < len(block.branches):
                    for part in ("weight", "bias"):
                        key = f"{name}.blocks.{number}.modulation.{part}"
                        kept[key] = _rows(weights[key], list(block.branches), left)
        pruned.load_state_dict(kept, assign=True)
        pruned.set_grid(self.model.run_grid)                                    # builds its tables, off the meta device
        return pruned.train(self.model.training)


def _rows(modulation: Tensor, branches: list[str], left: Sequence[str]) -> Tensor:
    """The rows of the branches that are left, of the modulation's weight or bias."""
    rows = dict(zip(branches, modulation.chunk(len(branches)), strict=True))
    return torch.cat([rows[branch] for branch in left])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
