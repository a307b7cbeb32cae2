"""The networks of the paper's tables: their counts are the published designs', and they behave as networks must."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lamamba.benchmarking.flops import multiply_adds_by_module, saved_bytes
from lamamba.benchmarking.peers import adm, dim, dis, dit, ldm, u_vit
from lamamba.benchmarking.peers.mamba import CausalConvolution, SelectiveBranch
from lamamba.benchmarking.peers.registry import (
    PEERS,
    build_peer,
    find_peer,
    materialise,
    peer_activation_bytes,
    peer_operations,
    peers_for,
)
from lamamba.inference.packing import PackedLinear, can_pack, pack_convolutions, pack_weights

CPU, META = torch.device("cpu"), torch.device("meta")
GROUPS = dict(channels=32, num_blocks=1, head_channels=16, num_classes=10)      # GroupNorm has 32 groups

SMALL = {
    "adm": (3, 6, 32, lambda side: adm.ADM(adm.ADMSize(multipliers=(1, 2), attention_scales=(2,), **GROUPS), side)),
    "adm-512": (3, 6, 32, lambda side: adm.ADM(
        adm.ADMSize(**{**GROUPS, "channels": 64}, multipliers=(0.5, 1), attention_scales=(2,)), side)),
    "adm-u": (3, 6, 32, lambda side: adm.ADMU(
        side, adm.ADMSize(multipliers=(1, 1), attention_scales=(2,), **GROUPS),
        adm.ADMSize(multipliers=(1, 1), attention_scales=(2,), in_channels=6, **{**GROUPS, "head_channels": None}),
    )),
    "ldm": (4, 4, 16, lambda side: ldm.LDM(
        ldm.LDMSize((32, 64), (False, True), (1, 2), 4, num_blocks=1, label_width=16, num_classes=10), side)),
    "dit": (4, 8, 16, lambda side: dit.DiT(dit.DiTSize(48, 2, 2), side, num_classes=10)),
    "u-vit": (4, 4, 16, lambda side: u_vit.UViT(u_vit.UViTSize(32, 4, 2, 2, num_classes=10), side)),
    "dis": (4, 8, 16, lambda side: dis.DiS(dis.DiSSize(32, 4, state_size=4, num_classes=10), side)),
    "dim": (4, 4, 16, lambda side: dim.DiM(dim.DiMSize(32, 9, state_size=4, num_classes=10), side)),
}
"""Reduced configurations: channels in and out, side of the input, how to build for a side."""


def small(name: str, times: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """A reduced network with random weights, and three inputs, perhaps some times as large."""
    channels, _, side, build = SMALL[name]
    side *= times
    torch.manual_seed(0)
    with META:
        model = build(side)
    materialise(model, CPU, torch.float32)
    return model.eval(), torch.randn(3, channels, side, side)


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize(("name", "image_size", "parameters", "matrix", "scan"), [
    ("adm-256", 256, "553.838", "1119.83", "0.00"), ("adm-512", 512, "558.998", "1982.33", "0.00"),
    ("adm-u-256", 256, "607.700", "741.32", "0.00"),
    ("ldm-4", 256, "401.433", "104.23", "0.00"), ("ldm-8", 256, "395.497", "57.04", "0.00"),
    ("dit-s-2", 256, "32.963", "6.06", "0.00"), ("dit-b-2", 256, "130.512", "23.01", "0.00"),
    ("dit-l-2", 256, "458.103", "80.70", "0.00"), ("dit-xl-2", 256, "675.130", "118.62", "0.00"),
    ("dit-xl-2", 512, "676.014", "524.54", "0.00"), ("dit-xl-2", 1024, "679.553", "2909.22", "0.00"),
    ("dit-s-4", 256, "32.945", "1.41", "0.00"), ("dit-b-4", 256, "130.476", "5.57", "0.00"),
    ("dit-l-4", 256, "458.054", "19.70", "0.00"), ("dit-xl-4", 256, "675.074", "29.04", "0.00"),
    ("u-vit-h-2", 256, "500.832", "133.20", "0.00"), ("u-vit-h-4", 512, "500.943", "133.23", "0.00"),
    ("dis-h-2", 256, "906.967", "225.93", "11.26"),
    ("dim-huge", 256, "862.412", "307.86", "7.99"), ("dim-huge", 512, "863.591", "1034.59", "26.85"),
])
def test_counts_are_those_of_the_published_designs(name, image_size, parameters, matrix, scan):
    """M parameters, G multiply-adds of products and G operations of scans."""
    found = peer_operations(name, image_size)
    assert f"{found.parameters / 1e6:.3f}" == parameters
    assert f"{found.matrix / 1e9:.2f}" == matrix
    assert f"{found.scan / 1e9:.2f}" == scan


def test_parts_of_adm_u_and_ldm():
    with META:
        network, latent = adm.ADMU(256), ldm.LDM(ldm.SIZES[4], 64)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (network.base, network.upsampler)]
    assert [f"{count:.2f}" for count in counts] == ["295.90", "311.80"]
    assert sum(p.numel() for p in latent.labels.parameters()) == 1001 * 512
    inputs = (torch.empty(1, 3, 256, 256, device=META), torch.empty(1, device=META),
              torch.empty(1, dtype=torch.int64, device=META))
    by = multiply_adds_by_module(network, *inputs)
    assert [f"{by[f'{part}'] / 1e9:.2f}" for part in ("base", "upsampler")] == ["109.68", "631.64"]


def test_dis_by_hand():
    """Every module, with its tokens; the unconditional network has the 900 M of the paper."""
    d, l, n, r = 1536, 258, 16, 96
    direction = 2 * d * (4 + 1) + 2 * d * (r + 2 * n) + 2 * d * (r + 1) + 2 * d * (n + 1)
    block = d + 2 * d * 2 * d + 2 * direction + 2 * d * d
    skip, time, label = 2 * d * d + d, 8 * d * d + 5 * d, 2 * d * d + 2 * d + 1001 * d + d
    ends = 256 * d + d + (4 * 4 + 1) * d + d + (d + 1) * 32
    with META:
        unconditional = dis.DiS(dataclasses.replace(dis.H_2, num_classes=0), 32)
    count = sum(p.numel() for p in unconditional.parameters())
    assert count == 49 * block + 24 * skip + time + ends
    assert f"{count / 1e6:.2f}" == "900.71"
    found = peer_operations("dis-h-2", 256)
    assert found.parameters == count + label
    products = l * (49 * (2 * d * 2 * d + 2 * 2 * d * (2 * r + 2 * n) + 2 * d * d) + 24 * 2 * d * d)
    products += 256 * 16 * d + l * 32 * d + 8 * d * d + 2 * d * d
    assert f"{products / 1e9:.1f}" == "225.6"
    assert found.matrix == products + 49 * 2 * (l * 4) * 2 * d                  # the causal convolutions
    assert found.scan == 49 * 2 * l * 2 * d * (9 * n + 1)


@pytest.mark.parametrize(("image_size", "tokens", "published", "without_convolutions"), [
    (256, 366, "210", "307.7"), (512, 1230, "708", "1034.0"),
])
def test_dim_by_hand(image_size, tokens, published, without_convolutions):
    """The paper's figures are the input projections and skip Linears alone."""
    d, r, n, grid = 1536, 96, 16, image_size // 16
    inputs, skips = 49 * 2 * d * 2 * d * tokens, 24 * 2 * d * d * tokens
    assert (grid + 3) ** 2 + 5 == tokens
    assert abs((inputs + skips) / 1e9 - float(published)) < 1
    others = 49 * tokens * (2 * d * (2 * r + 2 * n) + 2 * d * d)
    ends = grid**2 * d * (16 + 16 + 2 * 9) + 2 * d * d + 3 * d * d + 2 * d * d
    assert f"{(inputs + skips + others + ends) / 1e9:.1f}" == without_convolutions
    found = peer_operations("dim-huge", image_size)
    assert found.matrix == inputs + skips + others + ends + 49 * tokens * 3 * 2 * d
    block = d + 2 * d * 2 * d + 2 * d * (3 + r + 2 * n + r + 1 + n + 1) + 2 * d * d
    outside = (16 + 1 + 2 * 10 + grid**2 + 1 + 1001 + 1) * d + 2 * (d * d + d) + 5 * (d * d + d) + (d + 1) * 16
    assert found.parameters == 49 * block + 24 * (2 * d * d + d) + outside


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_values(name, times):
    model, x = small(name, times)
    timestep, labels = torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        y = model(x, timestep, labels)
    assert y.shape == (3, SMALL[name][1], *x.shape[2:])
    assert torch.isfinite(y).all()
    assert y.std() > 0.01


@pytest.mark.parametrize("name", SMALL)
def test_the_condition_changes_the_output_and_images_do_not_influence_each_other(name):
    model, x = small(name)
    timestep, labels = torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        y = model(x, timestep, labels)
        assert differ(y, model(x, timestep, torch.tensor([0, 4, 8]))) > 1e-4
        assert differ(y, model(x, torch.tensor([10.0, 500.0, 800.0]), labels)) > 1e-4
        assert differ(y, model(-x, timestep, labels)) > 1e-2
        others = model(torch.cat([x[:2], x[2:] + 1]), torch.tensor([10.0, 500.0, 100.0]), torch.tensor([0, 4, 1]))
        assert differ(y[:2], others[:2]) < 1e-5
        assert differ(y[2:], others[2:]) > 1e-3
        assert differ(y[1:2], model(x[1:2], timestep[1:2], labels[1:2])) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_reaches_every_weight(name):
    model, x = small(name)
    model.train()(x, torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 4, 9])).square().mean().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_is_set_when_a_network_is_allocated(name, monkeypatch):
    """What is allocated holds NaN first, in the dtype that it keeps."""
    to_empty = nn.Module.to_empty

    def to_nan(self, **options):
        to_empty(self, **options)
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data.fill_(torch.nan)
        return self

    monkeypatch.setattr(nn.Module, "to_empty", to_nan)
    with META:
        model = SMALL[name][3](SMALL[name][2])
    materialise(model, CPU, torch.bfloat16)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), key
        assert tensor.dtype == torch.bfloat16, key


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_weights_are_packed_without_changing_the_output(name):
    channels, _, side, build = SMALL[name]
    torch.manual_seed(0)
    with META:
        model = build(side)
    materialise(model, CPU, torch.bfloat16)
    x = torch.randn(2, channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
    inputs = x, torch.tensor([10.0, 900.0]), torch.tensor([0, 9])
    with torch.no_grad():
        plain = model.eval()(*inputs)
        pack_weights(model, 64)
        pack_convolutions(model)
        packed = model(*inputs)
    assert packed.dtype == torch.bfloat16
    assert differ(plain.float(), packed.float()) < 0.05
    assert any(isinstance(module, PackedLinear) for module in model.modules()) == can_pack(torch.bfloat16)


@pytest.mark.parametrize("name", SMALL)
def test_activations_counted_without_computing_are_those_of_a_real_pass(name, monkeypatch):
    channels, _, side, build = SMALL[name]
    monkeypatch.setitem(PEERS, name, dataclasses.replace(
        PEERS["dit-s-2"], make=lambda module, side: build(side), channels=channels, scale=1))
    model, x = small(name)
    real = saved_bytes(model.train(), x[:1], torch.tensor([10.0]), torch.tensor([3]))
    assert peer_activation_bytes.__wrapped__(name, side) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_branch_is_causal_and_reversed_it_is_the_mirror_image(reverse):
    torch.manual_seed(0)
    branch, x = SelectiveBranch(8, 4, 2, kernel=3), torch.randn(2, 10, 8)
    branch.reset_parameters()
    y, before, after = branch(x, reverse), slice(0, 5), slice(5, 10)
    unseen, seen = (before, after) if reverse else (after, before)
    changed = x.clone()
    changed[:, unseen] += 1
    assert torch.allclose(branch(changed, reverse)[:, seen], y[:, seen], atol=1e-6)
    assert not torch.allclose(branch(changed, reverse)[:, unseen], y[:, unseen], atol=1e-3)
    assert torch.allclose(branch(x.flip(1), not reverse).flip(1), y, atol=1e-6)


def test_the_causal_convolution_is_conv1d_of_the_tokens_before():
    torch.manual_seed(0)
    layer, x = CausalConvolution(6, 4, bias=True), torch.randn(2, 9, 6)
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, layer.weight[:, :, 0], layer.bias, groups=6))
    assert torch.allclose(layer(x), expected.mT, atol=1e-6)


def test_the_orders_of_dim_begin_with_the_conditions():
    orders = dim.reading_orders(2, 3) - dim.CONDITIONS - dim.PADDING
    assert (orders[:, :5] < 0).all()
    assert orders[:, 5:].tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]
    ]


def test_patches_are_put_together_where_they_were():
    from lamamba.benchmarking.peers.tokens import Patches, to_image

    layer, x = Patches(2, 8, 2), torch.randn(1, 2, 4, 6)
    with torch.no_grad():                                                       # the identity: (row, column, channel)
        layer.weight.copy_(torch.eye(8).view(2, 2, 2, 8).permute(3, 2, 0, 1))
        layer.bias.zero_()
        assert torch.equal(to_image(layer(x), (2, 3), 2), x)


def test_unknown_names_and_sizes_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dit-xl-2'"):
        find_peer("dit-xl2")
    with pytest.raises(ValueError, match="image_size=100 is not a multiple of 32; use 96 or 128"):
        find_peer("adm-256").side(100)
    with pytest.raises(ValueError, match="use 64 or 128"):
        find_peer("adm-512").side(16)


def test_networks_of_a_size():
    assert {"adm-256", "adm-u-256", "ldm-4", "u-vit-h-2", "dit-xl-2", "dis-h-2", "dim-huge"} <= set(peers_for(256))
    assert {"adm-512", "u-vit-h-4"} <= set(peers_for(512)) - set(peers_for(256))


def test_a_network_is_allocated_in_its_dtype_with_channels_last():
    model = build_peer("dit-s-4", 64, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
