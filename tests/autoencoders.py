"""Small autoencoders of every kind, with random weights, as diffusers saves them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny


def make_kl(seed=0, **changes):
    torch.manual_seed(seed)
    options = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
        shift_factor=0.25,
    )
    return AutoencoderKL(**{**options, **changes}).eval()


def make_tiny(seed=0):
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def make_dc(seed=0):
    torch.manual_seed(seed)
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    ).eval()


MAKERS = {"AutoencoderKL": make_kl, "AutoencoderTiny": make_tiny, "AutoencoderDC": make_dc}
