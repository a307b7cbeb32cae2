"""DiT is DiT as published: its multiply-adds by hand, and diffusers' own output."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from lamamba.benchmarking.peers.dit import DiT, DiTSize
from lamamba.benchmarking.peers.registry import peer_operations

SMALL = DiTSize(width=48, depth=3, num_heads=2)


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("image_size", "published"), [(256, 118.64), (512, 524.60), (1024, 2910.30)])
def test_multiply_adds_of_xl(image_size, published):
    """Every product by hand; the published numbers were counted by another tool and are 0.04 % larger at most."""
    width, depth, tokens = 1152, 28, (image_size // 16) ** 2
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * (16 + 32) * width + (256 + width) * width + 2 * width**2
    assert peer_operations("dit-xl-2", image_size).matrix == depth * block + ends
    assert peer_operations("dit-xl-2", image_size).matrix / 1e9 == pytest.approx(published, rel=4e-4)


def test_output_is_that_of_an_embedder_in_every_block():
    torch.manual_seed(0)
    own = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=3, sample_size=8
    ).eval()
    embedder = own.transformer_blocks[0].norm1.emb.state_dict()
    for block in own.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder)
    shared = DiT(SMALL, 8).train()                                              # no label is dropped, train() or not
    weights = {name.replace(".net.0.proj.", ".net.0.0."): weight for name, weight in own.state_dict().items()}
    shared.transformer.load_state_dict(weights, strict=False)
    shared.embedding.load_state_dict(embedder)
    x, timestep, labels = torch.randn(4, 4, 8, 8), torch.rand(4) * 1000, torch.tensor([0, 7, 999, 1000])
    expected = own(x, timestep, labels).sample
    assert torch.equal(shared(x, timestep, labels), expected)
    assert parameters(shared) < parameters(own)


def test_training_begins_with_blocks_that_change_nothing_and_an_output_of_zero():
    torch.manual_seed(0)
    model = DiT(SMALL, 16, in_channels=1, out_channels=1, patch_size=4, num_classes=10)
    model.initialise()
    x, timestep, labels = torch.randn(2, 1, 16, 16), torch.tensor([10.0, 900.0]), torch.tensor([3, 10])
    output = model(x, timestep, labels)
    assert output.shape == x.shape
    assert not output.any()
    hidden, c = torch.randn(2, 16, SMALL.width), torch.randn(2, SMALL.width)
    for block in model.transformer.transformer_blocks:
        assert torch.equal(block(hidden, timestep=c), hidden)
        attention = block.attn1.to_q.weight
        assert attention.abs().max() <= (6 / (2 * SMALL.width)) ** 0.5           # Glorot's uniform
        assert attention.std() > 0.1
    assert float(model.embedding.class_embedder.embedding_table.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
