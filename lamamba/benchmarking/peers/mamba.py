"""One direction of a Mamba block (arXiv 2312.00752, Fig. 3), by the scan of lamamba.ops with one path."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.ops import selective_scan

DT_MIN, DT_MAX = 1e-3, 1e-1


class CausalConvolution(nn.Conv2d):
    """SiLU of a depthwise convolution over the tokens before and at each: (b, l, c) -> (b, l, c).

    Reversed, over the tokens at and after each. It is a 1 x k convolution of a (b, c, 1, l) image with channels last,
    which PyTorch computes without copies.
    """

    def __init__(self, channels: int, kernel: int, bias: bool):
        super().__init__(channels, channels, (1, kernel), groups=channels, bias=bias)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        past = self.kernel_size[1] - 1
        x = F.pad(x, (0, 0, 0, past) if reverse else (0, 0, past, 0))
        weight = self.weight.flip(-1) if reverse else self.weight
        y = F.conv2d(x.mT[:, :, None], weight, self.bias, groups=self.groups)
        return F.silu(y[:, :, 0].mT)


class SelectiveBranch(nn.Module):
    """Causal convolution and selective scan of a sequence: (b, l, c) -> (b, l, c).

        x = SiLU(conv(x))
        dt, B, C = split(Linear(x))
        y = selective_scan(x, dt, B, C)

    Args:
        channels: c, of the scan.
        state_size: N.
        dt_rank: R, rank of the time step's projection.
        kernel: tokens of the convolution.
        conv_bias: whether the convolution has a bias.
    """

    def __init__(self, channels: int, state_size: int, dt_rank: int, kernel: int, conv_bias: bool = True):
        super().__init__()
        c, n, r = channels, state_size, dt_rank
        self.sizes = [r, n, n]
        self.conv = CausalConvolution(c, kernel, conv_bias)
        self.x_proj = nn.Linear(c, r + 2 * n, bias=False)
        self.W_dt = nn.Parameter(torch.empty(1, c, r))
        self.b_dt = nn.Parameter(torch.empty(1, c))
        self.A_log = nn.Parameter(torch.empty(1, c, n))
        self.D = nn.Parameter(torch.empty(1, c))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A = -(1 .. n); softplus(b_dt) log-uniform in [0.001, 0.1]."""
        nn.init.uniform_(self.W_dt, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
        step = torch.empty_like(self.b_dt).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp_()
        self.b_dt.copy_(step + torch.log(-torch.expm1(-step)))                  # softplus(b_dt) = step
        rates = torch.arange(1, self.sizes[1] + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(rates.log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Compute y, from the first token to the last, or reversed."""
        x = self.conv(x, reverse)
        dt, B, C = (part[:, :, None] for part in self.x_proj(x).split(self.sizes, dim=-1))
        path = torch.arange(x.shape[1], device=x.device)[None]
        A = -torch.exp(self.A_log.float())
        return selective_scan(x, dt, B, C, self.W_dt, self.b_dt, A, self.D, path.flip(1) if reverse else path)
