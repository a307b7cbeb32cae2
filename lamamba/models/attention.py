"""Window attention: the local token mixing of a LaMamba block (Swin, arXiv 2103.14030)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamamba.config import Grid
from lamamba.models.geometry import Geometry
from lamamba.ops.dispatch import is_transformed
from lamamba.ops.layers import window_attention


class WindowAttention(nn.Module):
    """Multi-head attention in non-overlapping windows with a learned relative position bias (Swin, Eq. 4).

        Attention(Q, K, V) = softmax(Q K^T / sqrt(d) + bias) V                  within each window, for each head

    (b, h, w, width) -> (b, h, w, width). A shifted layer first rolls the grid by half a window along each axis that has
    more than one window. Where the window does not divide the grid, the grid is padded and the padding masked out.

    Args:
        width: channels c of the tokens.
        num_heads: heads of c / num_heads channels.
        window: (height, width) of a window in tokens.
        shifted: whether to roll the grid and mask across regions (every second block of a stage).
    """

    def __init__(self, width: int, num_heads: int, window: Grid, shifted: bool):
        super().__init__()
        self.num_heads, self.shifted = num_heads, shifted
        self.qkv = nn.Linear(width, 3 * width)
        self.bias_table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), num_heads))
        self.out_proj = nn.Linear(width, width)
        self._cached_bias: tuple[Grid, Tensor, Tensor] | None = None

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def constants(self, geometry: Geometry) -> Tensor:
        """The relative position bias that `forward` gathers, (heads, tokens, tokens)."""
        return self._bias(geometry).contiguous()

    def forward(self, x: Tensor, geometry: Geometry, constants: Tensor | None = None) -> Tensor:
        bias = self._bias(geometry) if constants is None else constants
        shift, mask = (geometry.shift, geometry.shifted_mask) if self.shifted else ((0, 0), geometry.mask)
        qkv = self.qkv(x)                                                       # (b, h, w, 3 c)
        y = window_attention(qkv, bias, mask, self.num_heads, geometry.window, shift)
        return self.out_proj(y)

    def _bias(self, geometry: Geometry) -> Tensor:
        """Relative position bias of every (query, key) pair of a window: (heads, tokens, tokens).

        Cached on a CPU without gradients, and gathered again when the table has changed. The values are compared, at a
        twentieth of the gather's cost, because an edit through `.data` leaves no other trace.
        """
        table, window = self.bias_table, geometry.window
        follows = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed()
        cacheable = table.device.type == "cpu" and not follows
        if cacheable and self._cached_bias is not None:
            cached_window, cached_table, bias = self._cached_bias
            if cached_window == window and cached_table.dtype == table.dtype and torch.equal(cached_table, table):
                return bias
        tokens = window[0] * window[1]
        bias = table[geometry.relative_positions].view(tokens, tokens, self.num_heads).permute(2, 0, 1)
        if cacheable:
            bias = bias.to(torch.promote_types(table.dtype, torch.float32)).contiguous()
            self._cached_bias = window, table.detach().clone(), bias
        return bias
