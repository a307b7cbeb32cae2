"""Reference implementation of the layers in PyTorch: any device and dtype, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lamamba.config import Grid
from lamamba.ops.dispatch import is_transformed, needs_formula


def layer_norm(x, weight, bias, eps) -> Tensor:
    if weight is not None:                                                      # 16-bit ones with float32 tokens
        weight, bias = (part.to(torch.promote_types(part.dtype, x.dtype)) for part in (weight, bias))
    if not is_transformed():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # under vmap the second derivatives of F.layer_norm are wrong in torch 2.11 to 2.14
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(variance + eps)
    return normal if weight is None else normal * weight + bias


def modulated_norm(x, weight, bias, shift, scale, eps) -> Tensor:
    normal = layer_norm(x, weight, bias, eps)
    return normal * (1 + scale[:, None, None]) + shift[:, None, None]


def gated_norm(x, z, weight, bias, eps) -> Tensor:
    return layer_norm(x, weight, bias, eps) * F.silu(z)


def gated_sum(x, y, gate) -> Tensor:
    return torch.addcmul(x, gate[:, None, None], y)


def gated_sum_norm(x, y, gate, weight, bias, shift, scale, eps) -> tuple[Tensor, Tensor]:
    total = gated_sum(x, y, gate)
    return total, modulated_norm(total, weight, bias, shift, scale, eps)


def linear_gelu(x, weight, bias) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def local_mixing(x, weight) -> Tensor:
    mixed = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0])
    return F.silu(mixed.permute(0, 2, 3, 1))


def window_attention(qkv, bias, mask, num_heads: int, window: Grid, shift: Grid) -> Tensor:
    b, h, w, c = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    (wh, ww), heads = window, num_heads
    rows, columns, tokens = -(-h // wh), -(-w // ww), wh * ww
    H, W = rows * wh, columns * ww
    if (h, w) != (H, W):
        qkv = F.pad(qkv, (0, 0, 0, W - w, 0, H - h))
    if tuple(shift) != (0, 0):
        qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
    qkv = qkv.view(b, rows, wh, columns, ww, 3, heads, c // heads)
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, b, rows * columns, heads, tokens, c // heads)

    if mask is None:                                                            # all windows share the bias
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))                    # (b windows, heads, tokens, d)
    else:                                                                       # all images share the masks
        bias = bias.masked_fill(~mask[:, None], float("-inf")).flatten(0, 1)
        q, k, v = (part.flatten(1, 2) for part in (q, k, v))                    # (b, windows heads, tokens, d)
    attention = attention_formula if needs_formula() else F.scaled_dot_product_attention
    y = attention(q, k, v, bias[None].to(q.dtype))

    y = y.reshape(b, rows, columns, heads, wh, ww, c // heads).permute(0, 1, 4, 2, 5, 3, 6).reshape(b, H, W, c)
    if tuple(shift) != (0, 0):
        y = y.roll(shift, (1, 2))
    return y[:, :h, :w]


def attention_formula(q, k, v, bias) -> Tensor:
    """scaled_dot_product_attention, which has no forward mode and no second derivatives, in operations that have."""
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias, dim=-1) @ v


def few_rows_linear(x, weight, bias) -> Tensor:
    return F.linear(x, weight, bias)
