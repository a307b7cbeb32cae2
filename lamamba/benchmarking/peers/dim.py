"""DiM (arXiv 2405.14224): one-way Mamba blocks that read the grid in alternating orders, with long skips.

What the paper leaves open, and what is chosen so that its 860 M parameters (862.41 M) and the 366 and 1230 tokens
behind its operations come out: three padding tokens end each row, three more rows end the grid, and three follow the
tokens of label and timestep at the beginning; all blocks share one modulation of the condition (shift, scale, gate),
the output has its own (shift, scale); positions of the grid are learned; the timestep passes an MLP as wide as the
network; the causal convolutions have no bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.benchmarking.peers.mamba import SelectiveBranch
from lamamba.benchmarking.peers.tokens import Patches, TokenTable, timestep_features, to_image

PADDING, CONDITIONS = 3, 2
"""Padding tokens at the end of a row, of a column and of the conditions; tokens of label and timestep."""


@dataclass(frozen=True)
class DiMSize:
    """Hyperparameters, as the paper's table of sizes."""

    width: int
    depth: int
    """Blocks, an odd number: those after the middle one have skips."""
    state_size: int = 16
    kernel: int = 3
    patch_size: int = 2
    channels: int = 4
    num_classes: int = 1000


HUGE = DiMSize(1536, 49)


def reading_orders(height: int, width: int) -> Tensor:
    """The orders of four blocks in a row: by rows, by columns, and both from the end; the conditions always first.

    Returns:
        (4, l) int64, tokens of the sequence of conditions and the padded grid in row-major order.
    """
    first = torch.arange(CONDITIONS + PADDING)
    grid = torch.arange(height * width).view(height, width) + len(first)
    orders = (grid.flatten(), grid.T.flatten(), grid.flatten().flip(0), grid.T.flatten().flip(0))
    return torch.stack([torch.cat([first, order]) for order in orders])


class Smoother(nn.Conv2d):
    """Depthwise 3 x 3 convolution of tokens, added to them: (b, h, w, c) -> (b, h, w, c)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DiMBlock(nn.Module):
    """A Mamba block in one order of reading; with a skip, the sum of two Linears first: (b, l, width) -> same.

        u, z = split(Linear(RMSNorm(x) (1 + scale) + shift))
        x = x + gate Linear(scan(u) SiLU(z))
    """

    def __init__(self, size: DiMSize, has_skip: bool):
        super().__init__()
        width, inner = size.width, 2 * size.width
        self.from_tokens = nn.Linear(width, width, bias=False) if has_skip else None
        self.from_skip = nn.Linear(width, width) if has_skip else None
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.branch = SelectiveBranch(inner, size.state_size, -(-width // 16), size.kernel, conv_bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, order: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.from_tokens is not None and self.from_skip is not None:
            x = self.from_tokens(x) + self.from_skip(skip)
        shift, scale, gate = modulation.chunk(3, dim=-1)                        # (b, 1, width) each
        read = (self.norm(x) * (1 + scale) + shift)[:, order]
        u, z = self.in_proj(read).chunk(2, dim=-1)
        y = self.out_proj(self.branch(u) * F.silu(z))
        return x + gate * torch.empty_like(y).index_copy_(1, order, y)


class DiM(nn.Module):
    """DiM: (b, c, h, w), (b,), (b,) -> (b, c, h, w).

    Args:
        size: hyperparameters.
        grid: side of the latents.
    """

    def __init__(self, size: DiMSize, grid: int):
        super().__init__()
        self.size, width = size, size.width
        self.patches = Patches(size.channels, width, size.patch_size)
        self.positions = TokenTable((grid // size.patch_size) ** 2, width)
        self.first_smoother, self.last_smoother = Smoother(width), Smoother(width)
        self.padding = TokenTable(1, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(size.num_classes + 1, width)
        self.modulation = nn.Linear(width, 3 * width)
        self.blocks = nn.ModuleList(DiMBlock(size, has_skip=i > size.depth // 2) for i in range(size.depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.last_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, size.patch_size**2 * size.channels)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        p, half = self.size.patch_size, self.size.depth // 2
        b, h, w = x.shape[0], x.shape[2] // p, x.shape[3] // p
        time = self.time(timestep_features(timestep, self.size.width, x.dtype))
        label = self.labels(class_labels)
        c = F.silu(time + label)[:, None]                                       # (b, 1, width)
        modulation = self.modulation(c)
        x = self.first_smoother(self.positions(self.patches(x)).view(b, h, w, -1))
        x = torch.cat([label[:, None], time[:, None], *self._padded(x)], dim=1)  # (b, 5 + (h + 3) (w + 3), width)
        orders = reading_orders(h + PADDING, w + PADDING).to(x.device)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x, modulation, orders[i % 4], skips.pop() if i > half else None)
            if i < half:
                skips.append(x)
        grid = x[:, CONDITIONS + PADDING:].view(b, h + PADDING, w + PADDING, -1)[:, :h, :w]
        shift, scale = self.last_modulation(c)[:, None].chunk(2, dim=-1)
        grid = self.norm(self.last_smoother(grid)) * (1 + scale) + shift
        return to_image(self.head(grid).flatten(1, 2), (h, w), p)

    def _padded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The padding tokens after the conditions, and the grid with its own: (b, 3, c) and (b, (h+3) (w+3), c)."""
        b, h, w, width = x.shape
        token = self.padding.table
        grid = token.view(1, 1, 1, width).expand(b, h + PADDING, w + PADDING, width).clone()
        grid[:, :h, :w] = x
        return token.expand(b, PADDING, width), grid.flatten(1, 2)
