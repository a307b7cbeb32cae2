"""The LaMamba block: scan, then windows, then MLP, each told by the condition how loudly to speak."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.config import UNetConfig
from lamamba.models.attention import WindowAttention
from lamamba.models.geometry import Geometry
from lamamba.models.ss2d import SS2D
from lamamba.ops.layers import few_rows_linear, gated_sum, modulated_norm


class ModulatedNorm(nn.LayerNorm):
    """LayerNorm(x) (1 + scale) + shift, with (b, c) shift and scale for (b, h, w, c) tokens."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return modulated_norm(x, self.weight, self.bias, shift, scale, self.eps)


class ConditionLinear(nn.Linear):
    """A Linear for one row per image: reading its weights is the work."""

    def forward(self, c: Tensor) -> Tensor:
        return few_rows_linear(c, self.weight, self.bias)


class MLP(nn.Module):
    """Linear, GELU (exact), Linear on every token by itself."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_in = nn.Linear(width, hidden)
        self.linear_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(x)))


class LaMambaBlock(nn.Module):
    """Three residual branches with adaLN-Zero conditioning (paper, Eq. 5-7; DiT's adaLN).

        x = x + gate * branch(modulate(LayerNorm(x), shift, scale))     for scan, attention, mlp

    The condition gives nine vectors, three for each branch; all start at zero, so that a new block passes x through.
    A branch named in the config's removed_blocks is absent, and so are its three vectors.
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

    def zero_modulation(self) -> None:
        nn.init.zeros_(self.modulation.weight)

    def modulate(self, c: Tensor) -> Tensor:
        """What the condition (b, condition width) tells this block: (b, 3 branches width)."""
        return self.modulation(F.silu(self.condition(c)))

    def forward(self, x: Tensor, c: Tensor | None, geometry: Geometry, modulation: Tensor | None = None) -> Tensor:
        """x (b, h, w, width); the condition c, unless `modulate` has made of it all that is needed already."""
        if modulation is None:
            assert c is not None
            modulation = self.modulate(c)
        vectors = iter(modulation.chunk(3 * len(self.branches), dim=-1))
        for name, branch in self.branches.items():
            shift, scale, gate = next(vectors), next(vectors), next(vectors)
            y = branch(self.norms[name](x, shift, scale), geometry)
            x = gated_sum(x, y, gate)                                           # x + gate y
        return x
