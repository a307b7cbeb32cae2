"""Tiny pipelines of diffusers with random weights."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler

from tests.compression.unets import PLAIN, SD, SDXL, make

TOKENS = 6


def unconditional() -> DDPMPipeline:
    return DDPMPipeline(make({**PLAIN, "num_class_embeds": None}), DDPMScheduler(num_train_timesteps=100))


def text_conditioned(folder: Path, kind: str = "sd"):
    """A StableDiffusionPipeline or StableDiffusionXLPipeline; skips without transformers."""
    pytest.importorskip("transformers", reason="text encoders are of transformers")
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(words), "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": TOKENS, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
    }
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2, norm_num_groups=4, in_channels=3, out_channels=3,
    ).eval()
    if kind == "sd":
        text = CLIPTextModel(CLIPTextConfig(hidden_size=12, **sizes)).eval()
        return StableDiffusionPipeline(
            vae=vae, text_encoder=text, tokenizer=tokenizer, unet=make(SD), scheduler=DDIMScheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    first = CLIPTextModel(CLIPTextConfig(hidden_size=4, **sizes)).eval()
    second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=6, **sizes)).eval()
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=make(SDXL), scheduler=EulerDiscreteScheduler(),
    )
