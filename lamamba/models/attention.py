"""Attention among the tokens of a small window: the local, exact half of a LaMamba block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamamba.config import Grid
from lamamba.models.geometry import Geometry
from lamamba.ops.layers import window_attention


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
        self._kept: tuple[Grid, Tensor, Tensor] | None = None

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        shift, mask = (geometry.shift, geometry.shifted_mask) if self.shifted else ((0, 0), geometry.mask)
        qkv = self.qkv(x)                                                       # in grid order: a token is a token
        y = window_attention(qkv, self._bias(geometry), mask, self.num_heads, geometry.window, shift)
        return self.out_proj(y)

    def _bias(self, geometry: Geometry) -> Tensor:
        """The table's row of every pair of a window's tokens: (heads, tokens, tokens).

        On a CPU without gradients it is kept and made again when the table has changed. The numbers themselves are
        compared, which costs a twentieth of making it: an edit through `.data` leaves no other trace.
        """
        table, window = self.bias_table, geometry.window
        keeps = table.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if keeps and self._kept is not None:
            kept_window, kept_table, bias = self._kept
            if kept_window == window and kept_table.dtype == table.dtype and torch.equal(kept_table, table):
                return bias
        tokens = window[0] * window[1]
        bias = table[geometry.relative_positions].view(tokens, tokens, self.num_heads).permute(2, 0, 1)
        if keeps:
            bias = bias.to(torch.promote_types(table.dtype, torch.float32)).contiguous()
            self._kept = window, table.detach().clone(), bias
        return bias
