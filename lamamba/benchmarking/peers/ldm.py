"""LDM-4 and LDM-8 (arXiv 2112.10752), U-Nets on latents with cross-attention, with diffusers' UNet2DConditionModel."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

NUM_CLASSES, LABEL_WIDTH = 1000, 512


@dataclass(frozen=True)
class LDMSize:
    """Hyperparameters of a class-conditional model of ImageNet (appendix of the paper)."""

    widths: tuple[int, ...]
    """Channels of each resolution."""
    has_attention: tuple[bool, ...]
    num_heads: tuple[int, ...]
    """Of each resolution. (UNet2DConditionModel calls it attention_head_dim.)"""
    channels: int
    """Of the latents."""
    num_blocks: int = 2
    label_width: int = LABEL_WIDTH
    num_classes: int = NUM_CLASSES


SIZES = {
    4: LDMSize((192, 384, 576, 960), (False, True, True, True), (1, 1, 1, 1), channels=3),
    8: LDMSize((256, 512, 1024), (True, True, True), (8, 16, 32), channels=4),
}
"""By the factor of the autoencoder."""


class LDM(nn.Module):
    """LDM with its table of labels, the only context of its cross-attention: (b, c, h, w), (b,), (b,) -> (b, c, h, w).

    Args:
        size: hyperparameters.
        grid: side of the latents.
    """

    def __init__(self, size: LDMSize, grid: int):
        super().__init__()
        self.labels = nn.Embedding(size.num_classes + 1, size.label_width)
        self.unet = UNet2DConditionModel(
            sample_size=grid, in_channels=size.channels, out_channels=size.channels, block_out_channels=size.widths,
            down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in size.has_attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in size.has_attention[::-1]),
            layers_per_block=size.num_blocks, attention_head_dim=size.num_heads, cross_attention_dim=size.label_width,
        )

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        context = self.labels(class_labels)[:, None]                            # (b, 1, label_width)
        return self.unet(x, timestep, context, return_dict=False)[0]
