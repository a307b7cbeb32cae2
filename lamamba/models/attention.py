"""Attention among the tokens of a small window: the local, exact half of a LaMamba block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.config import Grid
from lamamba.models.geometry import Geometry


class WindowAttention(nn.Module):
    """Multi-head attention in non-overlapping windows with a learned relative position bias (Swin, Eq. 4).

    A shifted layer rolls the grid by half a window first, on each axis that has more than one window. Where the window
    does not divide the grid, the grid is padded and no real token sees the padding. (b, h, w, c) -> (b, h, w, c).
    """

    def __init__(self, width: int, num_heads: int, window: Grid, shifted: bool):
        super().__init__()
        self.num_heads, self.shifted = num_heads, shifted
        self.qkv = nn.Linear(width, 3 * width)
        self.bias_table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), num_heads))
        self.out_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        b, h, w, c = x.shape
        (wh, ww), (H, W) = geometry.window, geometry.padded
        shift = geometry.shift if self.shifted else (0, 0)
        rows, columns, tokens, heads = H // wh, W // ww, wh * ww, self.num_heads

        qkv = self.qkv(x)                                                       # in grid order: a token is a token
        if (h, w) != (H, W):
            qkv = F.pad(qkv, (0, 0, 0, W - w, 0, H - h))
        if shift != (0, 0):
            qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
        qkv = qkv.view(b, rows, wh, columns, ww, 3, heads, c // heads)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, b, rows * columns, heads, tokens, -1)

        bias = self.bias_table[geometry.relative_positions].view(tokens, tokens, heads).permute(2, 0, 1)
        mask = geometry.shifted_mask if self.shifted else geometry.mask
        if mask is None:                                                        # every window has the same bias
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))                # (b windows, heads, tokens, d)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        else:                                                                   # every image has the same masks
            bias = bias.masked_fill(~mask[:, None], float("-inf")).flatten(0, 1)
            q, k, v = (part.flatten(1, 2) for part in (q, k, v))                # (b, windows heads, tokens, d)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))

        y = y.reshape(b, rows, columns, heads, wh, ww, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(b, H, W, c)
        if shift != (0, 0):
            y = y.roll(shift, (1, 2))
        return self.out_proj(y[:, :h, :w])
