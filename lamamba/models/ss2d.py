"""SS2D: the global token mixing of a LaMamba block, by selective scans at a cost linear in the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.models.geometry import Geometry
from lamamba.ops.layers import local_mixing, scan_gated_norm
from lamamba.ops.scan_paths import NUM_PATHS

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class LocalMixing(nn.Conv2d):
    """SiLU of a depthwise 3 x 3 convolution, for tokens (b, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return local_mixing(x, self.weight)


class ScanGatedNorm(nn.LayerNorm):
    """LayerNorm(y) SiLU(z) with y = selective_scan(x, *scan), for tokens x and z (b, h, w, c)."""

    def forward(self, x: Tensor, z: Tensor, scan: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        return scan_gated_norm(x, z, scan, self.weight, self.bias, self.eps)


class SS2D(nn.Module):
    """2-D selective scan along four paths (VMamba, arXiv 2401.10166; paper, Fig. 3). (b, h, w, width) -> same.

        x, z = split(Linear(x))
        y = selective_scan(SiLU(conv3x3(x)))            summed over the four paths
        out = Linear(LayerNorm(y) SiLU(z))

    Args:
        width: channels of the tokens.
        scan_width: channels c of the scan.
        state_size: N, states per channel and path.
        dt_rank: R, rank of the time step projection.

    Letters as in lamamba.ops.selective_scan.
    """

    def __init__(self, width: int, scan_width: int, state_size: int, dt_rank: int):
        super().__init__()
        g, c, n, r = NUM_PATHS, scan_width, state_size, dt_rank
        self.dt_rank, self.state_size = r, n
        self.in_proj = nn.Linear(width, 2 * c, bias=False)
        self.conv = LocalMixing(c, c, 3, padding=1, groups=c, bias=False)
        self.W_x = nn.Parameter(torch.empty(g, r + 2 * n, c))
        self.W_dt = nn.Parameter(torch.empty(g, c, r))
        self.b_dt = nn.Parameter(torch.empty(g, c))
        self.A_log = nn.Parameter(torch.empty(g, c, n))
        self.D = nn.Parameter(torch.empty(g, c))
        self.out_norm = ScanGatedNorm(c)
        self.out_proj = nn.Linear(c, width, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A = -(1 .. n) (S4D-real); softplus(b_dt) log-uniform in [0.001, 0.1] (Mamba)."""
        nn.init.uniform_(self.W_x, -(self.W_x.shape[2] ** -0.5), self.W_x.shape[2] ** -0.5)
        nn.init.uniform_(self.W_dt, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step = torch.empty_like(self.b_dt).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp_().clamp_(min=DT_FLOOR)
        self.b_dt.copy_(step + torch.log(-torch.expm1(-step)))                  # softplus(b_dt) = step
        rates = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(rates.log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def constants(self, geometry: Geometry) -> Tensor:
        """The rates A that `forward` computes from weights alone, (g, c, n), channels innermost as Triton has them."""
        return self._rates().mT.contiguous().mT

    def _rates(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def forward(self, x: Tensor, geometry: Geometry, constants: Tensor | None = None) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)                                 # (b, h, w, c) each
        x = self.conv(x)
        # a token-wise projection commutes with the permutation: one product in grid order for all four directions
        projected = F.linear(x.flatten(1, 2), self.W_x.flatten(0, 1)).unflatten(-1, (NUM_PATHS, -1))
        dt, B, C = projected.split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        A = self._rates() if constants is None else constants
        scan = dt, B, C, self.W_dt, self.b_dt, A, self.D, geometry.paths
        return self.out_proj(self.out_norm(x, z, scan))
