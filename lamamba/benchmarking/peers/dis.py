"""DiS (arXiv 2402.05608): bidirectional Mamba blocks with long skips, all inputs tokens.

What the paper leaves open, and what is chosen so that its 900 M parameters come out (without labels; with them 907 M):
a block is one input and one output projection around two directions, each with a convolution, projections and a scan
of its own; the timestep passes an MLP that is four times as wide inside, the label's embedding one as wide as the
network; the output has the variance's channels, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.benchmarking.peers.mamba import SelectiveBranch
from lamamba.benchmarking.peers.tokens import Patches, TokenTable, run_with_skips, timestep_features, to_image


@dataclass(frozen=True)
class DiSSize:
    """Hyperparameters, as the paper's table of sizes."""

    width: int
    depth: int
    """Blocks before and after the middle one together."""
    state_size: int = 16
    kernel: int = 4
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    num_classes: int = 1000
    """0: unconditional."""


H_2 = DiSSize(1536, 48)


class DiSBlock(nn.Module):
    """Two Mamba directions under one gate: (b, l, width) -> same; with a skip, Linear of (b, l, 2 width) first.

        x, z = split(Linear(RMSNorm(x)))
        x = x + Linear((forward(x) + backward(x)) SiLU(z))
    """

    def __init__(self, size: DiSSize, has_skip: bool):
        super().__init__()
        width, inner = size.width, 2 * size.width
        self.skip = nn.Linear(2 * width, width) if has_skip else nn.Identity()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.first, self.last = (
            SelectiveBranch(inner, size.state_size, -(-width // 16), size.kernel) for _ in range(2)
        )
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(x)
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)                      # (b, l, 2 width) each
        y = self.first(u) + self.last(u, reverse=True)
        return x + self.out_proj(y * F.silu(z))


class DiS(nn.Module):
    """DiS: (b, in_channels, h, w), (b,), (b,) -> (b, out_channels, h, w).

    Args:
        size: hyperparameters.
        grid: side of the latents.
    """

    def __init__(self, size: DiSSize, grid: int):
        super().__init__()
        self.size, width = size, size.width
        self.patches = Patches(size.in_channels, width, size.patch_size)
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.num_conditions = 2 if size.num_classes else 1
        if size.num_classes:
            self.labels = nn.Embedding(size.num_classes + 1, width)
            self.label = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.positions = TokenTable(self.num_conditions + (grid // size.patch_size) ** 2, width)
        self.encoder, self.decoder = (
            nn.ModuleList(DiSBlock(size, has_skip) for _ in range(size.depth // 2)) for has_skip in (False, True)
        )
        self.middle = DiSBlock(size, has_skip=False)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, size.patch_size**2 * size.out_channels)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        p = self.size.patch_size
        grid = x.shape[2] // p, x.shape[3] // p
        tokens = [self.time(timestep_features(timestep, self.size.width, x.dtype))[:, None], self.patches(x)]
        if self.num_conditions == 2:
            assert class_labels is not None
            tokens.insert(1, self.label(self.labels(class_labels))[:, None])
        x = run_with_skips(self.positions(torch.cat(tokens, dim=1)), self.encoder, self.middle, self.decoder)
        return to_image(self.head(self.norm(x))[:, self.num_conditions:], grid, p)
