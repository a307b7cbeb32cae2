"""The LaMamba block: selective scan, window attention and MLP, each with adaLN-Zero modulation and gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.config import UNetConfig
from lamamba.models.attention import WindowAttention
from lamamba.models.geometry import Geometry
from lamamba.models.ss2d import SS2D
from lamamba.ops.layers import few_rows_linear, gated_sum, gated_sum_norm, linear_gelu, modulated_norm


def initialise_linears(network: nn.Module) -> None:
    """Set the weights of all Linear layers of a network Xavier-uniform and their biases zero, as the official code."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ModulatedNorm(nn.LayerNorm):
    """Adaptive LayerNorm: LayerNorm(x) (1 + scale) + shift, for tokens (b, h, w, c), shift and scale (b, c).

    With y and gate, a pair: the residual sum x + gate y, and the norm of that.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if y is None or gate is None:
            return modulated_norm(x, self.weight, self.bias, shift, scale, self.eps)
        return gated_sum_norm(x, y, gate, self.weight, self.bias, shift, scale, self.eps)


class ConditionLinear(nn.Linear):
    """Linear for the condition, (b, in) -> (b, out): one row per image, so its cost is reading the weights."""

    def forward(self, c: Tensor) -> Tensor:
        return few_rows_linear(c, self.weight, self.bias)


class MLP(nn.Module):
    """Token-wise Linear, GELU (exact), Linear: (b, h, w, width) -> (b, h, w, width)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_in = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.linear_out = nn.Linear(hidden, width)

    def constants(self, geometry: Geometry) -> None:
        """Nothing: `forward` reads its weights as they are."""

    def forward(self, x: Tensor, geometry: Geometry, constants: None = None) -> Tensor:
        linear = self.linear_in
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_plain(linear):
            return self.linear_out(self.gelu(linear(x)))
        return self.linear_out(linear_gelu(x, linear.weight, linear.bias))


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer computes x weight^T + bias and nothing else: no adapter, other number format or hook."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return type(linear) is nn.Linear and linear.bias is not None and not hooks


class LaMambaBlock(nn.Module):
    """Three residual branches with adaLN-Zero conditioning (paper, Eq. 5-7; DiT's adaLN).

        x = x + gate * branch(modulate(LayerNorm(x), shift, scale))     for scan, attention, mlp

    shift, scale and gate of the three branches are 9 vectors per image, Linear(SiLU(Linear(c))). Their weights start at
    zero, so that a new block is the identity. A branch in the config's removed_blocks has no parameters at all.

    Args:
        config: sizes of the network.
        name: of the block, as removed_blocks names it ("encoder.0.1").
        stage: 0 .. 3, the resolution it works at.
        shifted: whether its windows are shifted.
        projects_condition: whether c is first projected to the stage's width (else it has that width already).
    """

    def __init__(self, config: UNetConfig, name: str, stage: int, *, shifted: bool, projects_condition: bool):
        super().__init__()
        width = config.stage_width(stage)
        build = {
            "scan": lambda: SS2D(width, config.scan_width(width), config.state_size, config.dt_rank(width)),
            "attention": lambda: WindowAttention(width, config.num_heads, config.stage_window(stage), shifted),
            "mlp": lambda: MLP(width, int(config.mlp_ratio * width)),
        }
        branches = config.branches(name)
        self.condition = ConditionLinear(config.condition_width, width) if projects_condition else nn.Identity()
        self.modulation = ConditionLinear(width, 3 * len(branches) * width)
        self.norms = nn.ModuleDict({branch: ModulatedNorm(width) for branch in branches})
        self.branches = nn.ModuleDict({branch: build[branch]() for branch in branches})

    def modulate(self, c: Tensor) -> Tensor:
        """shift, scale and gate of every branch from the condition: (b, condition_width) -> (b, 3 branches width)."""
        return self.modulation(F.silu(self.condition(c)))

    def constants(self, geometry: Geometry) -> dict[str, Any]:
        """What the branches compute from weights and grid alone."""
        return {name: branch.constants(geometry) for name, branch in self.branches.items()}  # type: ignore[operator]

    def forward(
        self, x: Tensor, c: Tensor | None, geometry: Geometry, modulation: Tensor | None = None,
        constants: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Compute the block's output, (b, h, w, width).

        Args:
            x: (b, h, w, width) tokens.
            c: (b, condition_width); not read where modulation is given.
            geometry: of the stage's grid.
            modulation: `modulate(c)` where it was computed ahead.
            constants: those of `constants` where they were, for passes without gradients.
        """
        if modulation is None:
            assert c is not None
            modulation = self.modulate(c)
        return run_branches(x, modulation, self.norms, self.branches, geometry, constants or {})


def run_branches(
    x: Tensor, modulation: Tensor, norms: nn.ModuleDict, branches: nn.ModuleDict, geometry: Geometry,
    constants: Mapping[str, Any],
) -> Tensor:
    """Add the branches to the tokens x (b, h, w, c), each with its norm and its shift, scale and gate in modulation."""
    vectors = iter(modulation.chunk(3 * len(branches), dim=-1))
    y = gate = None
    for name, branch in branches.items():
        shift, scale = next(vectors), next(vectors)
        if y is None:
            normed = norms[name](x, shift, scale)
        else:
            x, normed = norms[name](x, shift, scale, y, gate)                   # x + gate y, and its norm
        y, gate = branch(normed, geometry, constants.get(name)), next(vectors)
    return x if y is None or gate is None else gated_sum(x, y, gate)
