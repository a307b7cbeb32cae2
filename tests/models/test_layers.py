"""The block and the scan as layers of other networks: they equal the network's, and the page's examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lamamba
from lamamba.models.geometry import make_geometry
from lamamba.models.ss2d import SS2D
from tests.networks import random_network, small_config

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"


def randomise(layer: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_page_run(number):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    values: dict = {}
    exec(blocks[number], values)
    if number == 0:
        assert values["scores"].shape == (2, 10)
    else:
        assert values["y"].shape == values["x"].shape
        assert torch.isfinite(values["y"]).all()


def test_the_classifier_of_the_page_learns():
    values: dict = {}
    exec(re.search(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1], values)
    torch.manual_seed(0)
    model, images = values["Classifier"](2, width=16), torch.randn(8, 3, 16, 24)
    labels = torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("scan", ["continuous", "cross"])
def test_the_layer_is_the_networks_block(shifted, scan):
    config = small_config(grid=(8, 12), state_size=2, scan=scan)
    network = random_network(config)
    block = network.decoder[3].blocks["1" if shifted else "0"]
    layer = lamamba.LaMambaLayer(
        16, 2, window_size=4, shifted=shifted, condition_width=config.condition_width, state_size=2, scan=scan
    ).eval()
    layer.load_state_dict(block.state_dict())
    x, c = torch.randn(2, 8, 12, 16), torch.randn(2, config.condition_width)
    with torch.no_grad():
        assert torch.equal(layer(x, c), block(x, c, make_geometry((8, 12), (4, 4), scan)))


def test_a_new_layer_with_a_condition_is_the_identity_and_one_without_is_not():
    x = torch.randn(2, 5, 7, 16)
    assert torch.equal(lamamba.LaMambaLayer(16, 2, condition_width=6)(x, torch.randn(2, 6)), x)
    assert not torch.allclose(lamamba.LaMambaLayer(16, 2)(x), x, atol=0.1)


def test_ss2d_is_the_networks_with_its_grid():
    layer = lamamba.SS2DLayer(16, state_size=2, scan="cross")
    same = SS2D(16, 32, 2, 1)
    same.load_state_dict(layer.state_dict())
    for grid in ((4, 6), (6, 4), (1, 3)):
        x = torch.randn(2, *grid, 16)
        assert torch.equal(layer(x), same(x, make_geometry(grid, (1, 1), "cross")))


@pytest.mark.parametrize("make", [lambda: lamamba.SS2DLayer(16), lambda: lamamba.LaMambaLayer(16, 4, window_size=3)])
def test_images_of_a_batch_do_not_influence_each_other_and_gradients_reach_every_weight(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(3, 5, 7, 16)
    randomise(layer)
    y = layer(x)
    changed = layer(torch.cat([x[:2], x[2:] + 1]))
    assert torch.allclose(y[:2], changed[:2], atol=1e-6)
    assert not torch.allclose(y[2], changed[2], atol=1e-2)
    assert torch.allclose(layer(x[1:2]), y[1:2], atol=1e-5)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    with torch.no_grad():
        assert torch.allclose(layer(x), y, atol=1e-5)                           # the kernels without gradients


def test_layers_are_traced_whole_once_for_each_grid():
    layer = lamamba.LaMambaLayer(16, 2, shifted=True, window_size=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    for grid in ((8, 6), (5, 6)):
        x = torch.randn(1, *grid, 16)
        y = compiled(x)
        y.square().mean().backward()
        assert torch.allclose(y, layer(x), atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("make", [
    lambda: lamamba.SS2DLayer(16), lambda: lamamba.LaMambaLayer(16, 2),
    lambda: lamamba.LaMambaLayer(16, 2, shifted=True),
])
def test_a_batch_may_be_empty_and_need_not_be_contiguous(make):
    layer, x = make(), torch.randn(2, 16, 5, 7).permute(0, 2, 3, 1)
    assert torch.equal(layer(x), layer(x.contiguous()))
    empty = torch.zeros(0, 5, 7, 16, requires_grad=True)
    y = layer(empty)
    y.sum().backward()
    assert y.shape == empty.grad.shape == empty.shape


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width=16 does not split into num_heads=3"):
        lamamba.LaMambaLayer(16, 3)
    for name, value in (("window_size", 0), ("window_size", 2.5), ("condition_width", 0), ("state_size", -1)):
        with pytest.raises(ValueError, match=f"{name}={value} must be a whole number of at least 1"):
            lamamba.LaMambaLayer(16, 2, **{name: value})
    for name, value in (("width", "16"), ("scan_width", 0), ("dt_rank", True)):
        with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number of at least 1"):
            lamamba.SS2DLayer(**{"width": 16, name: value})
    for value in (0, 0.01, -1, float("nan"), float("inf"), "4"):
        with pytest.raises(ValueError, match=f"mlp_ratio={value!r} must be a number that makes 1 hidden channel"):
            lamamba.LaMambaLayer(16, 2, mlp_ratio=value)
    with pytest.raises(ValueError, match="scan 'snake' is unknown"):
        lamamba.SS2DLayer(16, scan="snake")
    x = torch.zeros(1, 4, 4, 16)
    with pytest.raises(ValueError, match="takes no condition"):
        lamamba.LaMambaLayer(16, 2)(x, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="needs c"):
        lamamba.LaMambaLayer(16, 2, condition_width=4)(x)
    for c in (torch.zeros(3, 4), torch.zeros(1, 5), torch.zeros(4), torch.zeros(1, 1, 4)):
        with pytest.raises(ValueError, match=r"c=\(.*\) must be a condition for each image, \(1, 4\)"):
            lamamba.LaMambaLayer(16, 2, condition_width=4)(x, c)
    for layer in (lamamba.SS2DLayer(16), lamamba.LaMambaLayer(16, 2)):
        for wrong in (x[0], x[None], x[..., :8], x.permute(0, 3, 1, 2)):
            with pytest.raises(ValueError, match=r"must be tokens \(b, h, w, 16\), channels last"):
                layer(wrong)
