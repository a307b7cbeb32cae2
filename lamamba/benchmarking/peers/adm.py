"""ADM and ADM-U (arXiv 2105.05233), U-Nets on pixels, with diffusers' UNet2DModel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

NUM_CLASSES = 1000
"""Without a null label: ADM is guided by a classifier."""


@dataclass(frozen=True)
class ADMSize:
    """Hyperparameters of a U-Net (appendix of the paper)."""

    channels: int
    multipliers: tuple[float, ...]
    """Channels of each resolution in units of `channels`; each is half the one before."""
    num_blocks: int
    """Residual blocks of each resolution on the way down; one more on the way up."""
    attention_scales: tuple[int, ...]
    """Resolutions with attention: how many times coarser than the input."""
    head_channels: int | None = 64
    num_heads: int = 4
    """Where head_channels is None."""
    in_channels: int = 3
    out_channels: int = 6
    num_classes: int = NUM_CLASSES


SIZES = {
    256: ADMSize(256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32)),
    512: ADMSize(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64)),
}
"""By the image's side in pixels; attention at 32, 16 and 8 px."""
BASE = ADMSize(192, (1, 2, 3, 4), 3, (2, 4, 8))
UPSAMPLER = ADMSize(192, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), head_channels=None, in_channels=6)


class ADM(nn.Module):
    """ADM: (b, in_channels, h, w), (b,), (b,) -> (b, out_channels, h, w).

    UNet2DModel has ADM's layers, but for two things that are set here: its timestep has as many features as the first
    resolution has channels (ADM at 512 px: 256 features for 128 channels), and its heads have a fixed width.

    Args:
        size: hyperparameters.
        side: of the input in pixels.
    """

    def __init__(self, size: ADMSize, side: int):
        super().__init__()
        has_attention = [2**level in size.attention_scales for level in range(len(size.multipliers))]
        self.unet = UNet2DModel(
            sample_size=side, in_channels=size.in_channels, out_channels=size.out_channels,
            block_out_channels=tuple(int(size.channels * multiplier) for multiplier in size.multipliers),
            down_block_types=tuple("AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in has_attention),
            up_block_types=tuple("AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in has_attention[::-1]),
            layers_per_block=size.num_blocks, attention_head_dim=size.head_channels or size.channels // size.num_heads,
            downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=32, norm_eps=1e-5, time_embedding_dim=4 * size.channels,
            num_class_embeds=size.num_classes,
        )
        self.unet.time_proj = Timesteps(size.channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.unet.time_embedding.linear_1 = nn.Linear(size.channels, 4 * size.channels)
        if size.head_channels is None:
            for module in self.unet.modules():
                if isinstance(module, Attention):
                    module.heads = size.num_heads

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.unet(x, timestep, class_labels, return_dict=False)[0]


class ADMU(nn.Module):
    """ADM-U: the network of 64 px and the one that upsamples its images to 256 px (its appendix).

    The two have diffusion processes of their own. One pass here is one pass of each: the base denoises the image at a
    quarter of its side, and what it returns, enlarged bilinearly, is the upsampler's condition beside the image.
    (b, 3, h, w), (b,), (b,) -> (b, 6, h, w).

    Args:
        base, upsampler: hyperparameters.
        side: of the large image in pixels.
    """

    def __init__(self, side: int, base: ADMSize = BASE, upsampler: ADMSize = UPSAMPLER):
        super().__init__()
        self.base = ADM(base, side // 4)
        self.upsampler = ADM(upsampler, side)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        small = self.base(F.avg_pool2d(x, 4), timestep, class_labels)[:, : x.shape[1]]
        large = F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)
        return self.upsampler(torch.cat([x, large], dim=1), timestep, class_labels)
