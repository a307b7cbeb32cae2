"""Patch merging and patch expanding: the resolution changes between stages."""

from __future__ import annotations

from torch import Tensor, nn


class PatchMerging(nn.Module):
    """Patch merging (Swin): concatenate 2 x 2 tokens, LayerNorm, Linear. (b, h, w, c_in) -> (b, h/2, w/2, c_out).

    The (row, column) order of the concatenation is (0, 0), (1, 0), (0, 1), (1, 1).
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * c_in)
        self.linear = nn.Linear(4 * c_in, c_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
        return self.linear(self.norm(x))


class PatchExpanding(nn.Module):
    """Patch expanding: Linear, unfold each token to f x f, LayerNorm. (b, h, w, c_in) -> (b, f h, f w, c_out).

    Channels unfold in the order (row, column, channel), channel fastest: not torch.nn.PixelShuffle's order.
    """

    def __init__(self, c_in: int, c_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(c_in, factor * factor * c_out, bias=False)
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        p = self.factor
        x = self.linear(x).view(b, h, w, p, p, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, p * h, p * w, -1)
        return self.norm(x)
