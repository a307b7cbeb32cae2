"""Small U-Nets of diffusers with every kind of removable unit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from lamamba.compression.diffusers_units import example_inputs

CROSS = {
    "sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD = {**CROSS, "transformer_layers_per_block": 2}
"""As SD: no attention in the last down block."""
SDXL = {
    **CROSS, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 2),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 30,
}
PLAIN = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": 3,
}
RESAMPLED = {**PLAIN, "downsample_type": "resnet", "upsample_type": "resnet", "num_class_embeds": None}
"""Its resampling lies in residual blocks."""
SKIP = {
    **PLAIN, "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "num_class_embeds": None,
    "block_out_channels": (32, 32), "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "in_channels": 3,
    "mid_block_scale_factor": 2**0.5, "time_embedding_type": "fourier", "out_channels": 3,
}
"""NCSN++: resampling by filters, residuals that are scaled."""
CONFIGS = {"sd": SD, "sdxl": SDXL, "plain": PLAIN, "resampled": RESAMPLED, "skip": SKIP}


def make(config: dict[str, Any], seed: int = 0) -> UNet2DModel | UNet2DConditionModel:
    """A network without zero parameters, so that every one has an effect on the output."""
    torch.manual_seed(seed)
    model = (UNet2DConditionModel if "cross_attention_dim" in config else UNet2DModel)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs_for(model: UNet2DModel | UNet2DConditionModel, seed: int = 1) -> dict[str, Any]:
    """Random arguments of a forward pass."""
    generator = torch.Generator().manual_seed(seed)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(each) for key, each in value.items()}
        if value.dtype == torch.int64:
            return torch.randint(3, value.shape, generator=generator)
        return torch.randn(value.shape, generator=generator)

    return {**fill(example_inputs(model.config, "cpu")), "timestep": torch.tensor([500.0])}


@torch.no_grad()
def output(model: UNet2DModel | UNet2DConditionModel) -> torch.Tensor:
    """By a copy of the weights: on some processors the last bits of a product follow where in memory they begin."""
    return copy.deepcopy(model)(**inputs_for(model)).sample
