"""U-ViT (arXiv 2209.12152): a transformer with long skips, all of its inputs tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.benchmarking.peers.tokens import Patches, TokenTable, run_with_skips, timestep_features, to_image


@dataclass(frozen=True)
class UViTSize:
    """Hyperparameters, as the paper's table of sizes."""

    width: int
    depth: int
    """Blocks before and after the middle one together."""
    num_heads: int
    patch_size: int = 2
    channels: int = 4
    num_classes: int = 1000


H = UViTSize(1152, 28, 16)


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP: (b, l, width) -> (b, l, width); with a skip, Linear of (b, l, 2 width) first."""

    def __init__(self, width: int, num_heads: int, has_skip: bool):
        super().__init__()
        self.num_heads = num_heads
        self.skip = nn.Linear(2 * width, width) if has_skip else nn.Identity()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(x)
        b, l, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, l, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)                             # (b, heads, l, width / heads)
        x = x + self.out_proj(y.transpose(1, 2).reshape(b, l, width))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """U-ViT: (b, c, h, w), (b,), (b,) -> (b, c, h, w).

    The timestep's features are a token without an MLP, and there is no convolution at the end: so the large models of
    the paper are, and so their parameters come out.

    Args:
        size: hyperparameters.
        grid: side of the latents.
    """

    def __init__(self, size: UViTSize, grid: int):
        super().__init__()
        self.size, width = size, size.width
        self.patches = Patches(size.channels, width, size.patch_size)
        self.labels = nn.Embedding(size.num_classes + 1, width)
        self.positions = TokenTable(2 + (grid // size.patch_size) ** 2, width)
        self.encoder, self.decoder = (
            nn.ModuleList(UViTBlock(width, size.num_heads, has_skip) for _ in range(size.depth // 2))
            for has_skip in (False, True)
        )
        self.middle = UViTBlock(width, size.num_heads, has_skip=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, size.patch_size**2 * size.channels)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        p = self.size.patch_size
        grid = x.shape[2] // p, x.shape[3] // p
        time = timestep_features(timestep, self.size.width, x.dtype)[:, None]
        x = torch.cat([self.labels(class_labels)[:, None], time, self.patches(x)], dim=1)
        x = run_with_skips(self.positions(x), self.encoder, self.middle, self.decoder)              # (b, 2 + l, width)
        return to_image(self.head(self.norm(x))[:, 2:], grid, p)
