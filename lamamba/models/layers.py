"""The global mixing and the block of LaMamba-Diff as layers of other networks: plain constructors, any grid.

    layer = LaMambaLayer(96, num_heads=4)
    y = layer(x)                                            # (b, h, w, 96) -> (b, h, w, 96)

Their weights have the names of the network's, so that those of a trained block can be loaded.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lamamba.config import Grid, check_known
from lamamba.models.attention import WindowAttention
from lamamba.models.blocks import MLP, ConditionLinear, ModulatedNorm, initialise_linears, run_branches
from lamamba.models.geometry import Geometry, make_geometry
from lamamba.models.ss2d import SS2D
from lamamba.utils.text import shown

Scan = Literal["continuous", "cross"]


class SS2DLayer(SS2D):
    """2-D selective scan along four paths (VMamba, arXiv 2401.10166): (b, h, w, width) -> (b, h, w, width).

    Every token reaches every other, at a cost linear in their number.

    Args:
        width: channels of the tokens.
        scan_width: channels of the scan; by default twice the width.
        state_size: N, states for each channel and path.
        dt_rank: rank of the time step's projection; by default a 16th of the width, rounded up.
        scan: "continuous" snakes, or "cross", plain rows and columns.

    Raises:
        ValueError: for sizes below 1, or an unknown kind of paths.
    """

    def __init__(
        self,
        width: int,
        *,
        scan_width: int | None = None,
        state_size: int = 1,
        dt_rank: int | None = None,
        scan: Scan = "continuous",
    ):
        _check_sizes(width=width)
        sizes = {
            "width": width, "scan_width": 2 * width if scan_width is None else scan_width, "state_size": state_size,
            "dt_rank": math.ceil(width / 16) if dt_rank is None else dt_rank,
        }
        _check_sizes(**sizes)
        check_known("scan", scan, get_args(Scan))
        super().__init__(**sizes)
        self.scan: Scan = scan
        self.reset_parameters()

    def forward(self, x: Tensor, geometry: Geometry | None = None, constants: None = None) -> Tensor:  # type: ignore[override]
        """Mix the tokens x (b, h, w, width); geometry, as the network gives it, is not needed.

        Raises:
            ValueError: for tokens of another shape.
        """
        _check_tokens(x, self.in_proj.in_features)
        return super().forward(x, _geometry((x.shape[1], x.shape[2]), (1, 1), self.scan, x.device))


class LaMambaLayer(nn.Module):
    """The LaMamba block (paper, Eq. 5-7): selective scan, window attention and MLP, each with its residual.

        x = x + branch(LayerNorm(x))                                                   without a condition
        x = x + gate * branch(LayerNorm(x) (1 + scale) + shift)                        with one, adaLN-Zero

    shift, scale and gate come from the condition c; their weights start at zero, so that a new layer is the identity.
    Alternate `shifted` from layer to layer, so that windows reach each other. Where the window does not divide the
    grid, the grid is padded and the padding masked out.

    Args:
        width: channels of the tokens.
        num_heads: of the attention; they divide the width.
        window_size: side of an attention window in tokens.
        shifted: whether windows are shifted by half their side.
        condition_width: channels of the condition; None: the layer takes none.
        state_size: N, states of the scan for each channel and path.
        mlp_ratio: hidden channels of the MLP per channel.
        scan: "continuous" snakes, or "cross", plain rows and columns.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        window_size: int = 8,
        shifted: bool = False,
        condition_width: int | None = None,
        state_size: int = 1,
        mlp_ratio: float = 4.0,
        scan: Scan = "continuous",
    ):
        super().__init__()
        _check_sizes(width=width, num_heads=num_heads, window_size=window_size)
        if condition_width is not None:
            _check_sizes(condition_width=condition_width)
        if not isinstance(mlp_ratio, int | float) or not 1 <= mlp_ratio * width < math.inf:
            raise ValueError(f"mlp_ratio={shown(mlp_ratio)} must be a number that makes 1 hidden channel at least")
        if width % num_heads:
            raise ValueError(f"width={width} does not split into num_heads={num_heads}; choose a divisor of the width")
        self.width, self.window, self.scan = width, (window_size, window_size), scan
        branches: dict[str, nn.Module] = {
            "scan": SS2DLayer(width, state_size=state_size, scan=scan),
            "attention": WindowAttention(width, num_heads, self.window, shifted),
            "mlp": MLP(width, int(mlp_ratio * width)),
        }
        takes_condition = condition_width is not None
        norm = ModulatedNorm if takes_condition else nn.LayerNorm
        self.norms = nn.ModuleDict({name: norm(width) for name in branches})
        self.branches = nn.ModuleDict(branches)
        self.condition = ConditionLinear(condition_width, width) if condition_width is not None else None
        self.modulation = ConditionLinear(width, 9 * width) if takes_condition else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the network does: Linear weights Xavier-uniform, biases and modulation zero."""
        initialise_linears(self)
        for branch in ("scan", "attention"):
            self.branches[branch].reset_parameters()  # type: ignore[operator]
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Compute the layer's output, (b, h, w, width).

        Args:
            x: (b, h, w, width) tokens of any grid.
            c: (b, condition_width), for a layer with a condition.

        Raises:
            ValueError: for tokens or a condition of another shape; when a condition is missing, or was not expected.
        """
        _check_tokens(x, self.width)
        if (c is None) != (self.modulation is None):
            raise ValueError(
                "the layer was made with condition_width and needs c, (b, condition_width)" if c is None else
                "the layer takes no condition; make it with condition_width to give it one"
            )
        geometry = _geometry((x.shape[1], x.shape[2]), self.window, self.scan, x.device)
        if c is None or self.condition is None or self.modulation is None:
            for name, branch in self.branches.items():
                x = x + branch(self.norms[name](x), geometry)
            return x
        if c.ndim != 2 or len(c) not in (1, len(x)) or c.shape[1] != self.condition.in_features:
            raise ValueError(
                f"c={tuple(c.shape)} must be a condition for each image, {(len(x), self.condition.in_features)}")
        modulation = self.modulation(nn.functional.silu(self.condition(c))).expand(len(x), -1)
        return run_branches(x, modulation, self.norms, self.branches, geometry, {})


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={shown(value)} must be a whole number of at least 1")


def _check_tokens(x: Tensor, width: int) -> None:
    if x.ndim != 4 or x.shape[-1] != width:
        raise ValueError(f"x={tuple(x.shape)} must be tokens (b, h, w, {width}), channels last")


@torch.compiler.assume_constant_result
def _geometry(grid: Grid, window: Grid, scan: str, device: torch.device) -> Geometry:
    """Scan paths and masks of a grid, kept for the next call."""
    return _cached_geometry(grid, window, scan, device)


@lru_cache(maxsize=64)
def _cached_geometry(grid: Grid, window: Grid, scan: str, device: torch.device) -> Geometry:
    with torch.device("cpu"):                                                   # independent of a surrounding one
        return make_geometry(grid, window, scan).to(device)
