"""DiT-S to DiT-XL (arXiv 2212.09748), with diffusers' blocks and the paper's parameter count.

diffusers' DiTTransformer2DModel has an embedder of timestep and label in every block (749.8 M parameters for XL/2); the
paper's DiT has one for all blocks (675 M), evaluated once. `DiT` here is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from lamamba.models.blocks import initialise_linears

IN_CHANNELS, OUT_CHANNELS, PATCH_SIZE, NUM_CLASSES = 4, 8, 2, 1000


@dataclass(frozen=True)
class DiTSize:
    """Table 1 of the DiT paper (arXiv 2212.09748)."""

    width: int
    depth: int
    num_heads: int


SIZES = {"s": DiTSize(384, 12, 6), "b": DiTSize(768, 12, 12), "l": DiTSize(1024, 24, 16), "xl": DiTSize(1152, 28, 16)}


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
        self.embedding = self.transformer.transformer_blocks[0].norm1.emb
        self.embedding.class_embedder.dropout_prob = 0.0
        for block in self.transformer.transformer_blocks:
            block.norm1.emb = _Identity()
            gelu = block.ff.net[0]
            block.ff.net[0] = nn.Sequential(gelu.proj, nn.GELU(gelu.approximate))       # one product where packed
        positions = self.transformer.pos_embed
        table = positions.pos_embed                                             # (1, l, width), fixed
        del positions.pos_embed
        positions.pos_embed = nn.Parameter(table, requires_grad=False)          # so the paper counts it

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the table of positions, where the network was made on the meta device."""
        p = self.transformer.pos_embed
        table = PatchEmbed(p.height * p.patch_size, p.width * p.patch_size, p.patch_size, 1, p.proj.out_channels)
        p.pos_embed.copy_(table.pos_embed)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        c = self.embedding(timestep, class_labels, hidden_dtype=x.dtype)                            # (b, width)
        return self.transformer(x, timestep=c, class_labels=None, return_dict=False)[0]

    @torch.no_grad()
    def initialise(self) -> None:
        """Initialise for training: every block is the identity and the output zero (adaLN-Zero, Section 3.2)."""
        transformer = self.transformer
        initialise_linears(self)
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
