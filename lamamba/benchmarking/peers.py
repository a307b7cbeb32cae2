"""Peers of LaMamba: DiT-S/2 to XL/2 (arXiv 2212.09748), with diffusers' blocks and the paper's parameter count.

diffusers' DiTTransformer2DModel has an embedder of timestep and label in every block (749.8 M parameters for XL/2); the
paper's DiT has one for all blocks (675 M), evaluated once. `DiT` here is the paper's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamamba.benchmarking.flops import Cost
from lamamba.config import LATENT_SCALE, unknown_name

IN_CHANNELS, OUT_CHANNELS, PATCH_SIZE, NUM_CLASSES = 4, 8, 2, 1000


@dataclass(frozen=True)
class DiTSize:
    """Table 1 of the DiT paper (arXiv 2212.09748)."""

    width: int
    depth: int
    num_heads: int


PEERS = {
    "dit-s-2": DiTSize(384, 12, 6),
    "dit-b-2": DiTSize(768, 12, 12),
    "dit-l-2": DiTSize(1024, 24, 16),
    "dit-xl-2": DiTSize(1152, 28, 16),
}


class _Identity(nn.Module):
    """In place of the embedder of diffusers' blocks: their "timestep" is the embedding already."""

    def forward(self, timestep: Tensor, class_labels: Tensor | None, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return timestep


class DiT(nn.Module):
    """DiT with one shared embedder: (b, in_channels, h, w), (b,), (b,) -> (b, out_channels, h, w), as LaMambaUNet.

    Labels are 0 .. num_classes; the last is the null label. The network drops no labels.

    Args:
        size: width, depth and heads.
        grid: side of the input.
        in_channels, out_channels, patch_size, num_classes: by default those of the paper, for latents of ImageNet.
    """

    def __init__(
        self, size: DiTSize, grid: int, *, in_channels: int = IN_CHANNELS, out_channels: int = OUT_CHANNELS,
        patch_size: int = PATCH_SIZE, num_classes: int = NUM_CLASSES,
    ):
        super().__init__()
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=size.num_heads, attention_head_dim=size.width // size.num_heads,
            in_channels=in_channels, out_channels=out_channels, num_layers=size.depth, sample_size=grid,
            patch_size=patch_size, num_embeds_ada_norm=num_classes,
        )
        norms = [block.norm1 for block in self.transformer.transformer_blocks]
        self.embedding = norms[0].emb
        self.embedding.class_embedder.dropout_prob = 0.0
        for norm in norms:
            norm.emb = _Identity()

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        c = self.embedding(timestep, class_labels, hidden_dtype=x.dtype)                            # (b, width)
        return self.transformer(x, timestep=c, class_labels=None, return_dict=False)[0]

    @torch.no_grad()
    def initialise(self) -> None:
        """Initialise for training: every block is the identity and the output zero (adaLN-Zero, Section 3.2)."""
        transformer = self.transformer
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = transformer.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        nn.init.zeros_(patches.bias)
        for weight in (
            self.embedding.timestep_embedder.linear_1.weight, self.embedding.timestep_embedder.linear_2.weight,
            self.embedding.class_embedder.embedding_table.weight,
        ):
            nn.init.normal_(weight, std=0.02)
        zero = [block.norm1.linear for block in transformer.transformer_blocks]
        for module in (*zero, transformer.proj_out_1, transformer.proj_out_2):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def find_peer(name: str) -> DiTSize:
    """Size of a peer by name.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if name not in PEERS:
        raise unknown_name("peer", name, PEERS)
    return PEERS[name]


def build_peer(name: str, image_size: int, device: torch.device, dtype: torch.dtype) -> DiT:
    """A peer with random weights (only biases are zero), allocated on its device and in its dtype at once."""
    size, grid = find_peer(name), image_size // LATENT_SCALE
    with torch.device("meta"):
        model = DiT(size, grid)
    model.to(dtype).to_empty(device=device)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            module.reset_parameters()
    embed = PatchEmbed(grid, grid, PATCH_SIZE, IN_CHANNELS, size.width)
    model.transformer.pos_embed.pos_embed.copy_(embed.pos_embed)
    return model


@functools.cache
def peer_cost(name: str, image_size: int) -> Cost:
    """Parameters and multiply-adds (the paper's "GFLOPs") of one image, counted on the meta device; its activations."""
    grid = image_size // LATENT_SCALE
    with torch.device("meta"):
        model = DiT(find_peer(name), grid)
        inputs = torch.empty(1, IN_CHANNELS, grid, grid), torch.empty(1), torch.empty(1, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as operations:
        model.to("meta")(*inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, operations.get_total_flops() // 2, 0, 0, peer_activation_bytes(name, image_size))


def peer_activation_bytes(name: str, image_size: int) -> int:
    """Estimate of the bytes saved for the backward pass of one image in float32: 23 widths per token and block.

    The input and its two normalised, modulated copies, q, k and v, the output of attention, two gated branches, and the
    hidden layer of 4 widths before and after its activation, with what modulation and gates save.
    """
    size = find_peer(name)
    tokens = (image_size // LATENT_SCALE // PATCH_SIZE) ** 2
    return 4 * 23 * size.width * size.depth * tokens
