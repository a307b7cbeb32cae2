"""The Triton layers on a GPU: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lamamba.models.geometry import make_geometry
from lamamba.ops import layers, use_backend
from lamamba.ops.layers import reference
from tests.ops.accuracy import assert_accurate, layer_results

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

NAMES = ["modulated_norm", "gated_norm", "gated_sum", "local_mixing", "window_attention"]
NUM_HEADS = 16


@pytest.fixture(autouse=True)
def _with_triton():
    pytest.importorskip("triton", reason="triton is not installed")


def make_inputs(name, b, h, w, c, heads=NUM_HEADS, window=(8, 8)):
    """float32 inputs with the scale and strides that they have in a network."""
    random = torch.Generator("cuda").manual_seed(11)

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda")

    vectors = normal(b, 3 * c)
    if name == "modulated_norm":
        return normal(b, h, w, c), 1 + normal(c), normal(c), vectors[:, :c], vectors[:, c : 2 * c], 1e-5
    if name == "gated_norm":
        return normal(b, h, w, c), normal(b, h, w, 2 * c)[..., c:], 1 + normal(c), normal(c), 1e-5
    if name == "gated_sum":
        return normal(b, h, w, c), normal(b, h, w, c), vectors[:, 2 * c :]
    if name == "local_mixing":
        return normal(b, h, w, 2 * c)[..., :c], normal(c, 1, 3, 3) / 3
    geometry = make_geometry((h, w), window, "continuous").to("cuda")
    tokens = window[0] * window[1]
    bias = normal(tokens, tokens, heads).permute(2, 0, 1)
    return normal(b, h, w, 3 * c), bias, geometry.shifted_mask, heads, window, geometry.shift


def with_types(inputs, tokens, weights):
    """Floating-point inputs as leaves of these dtypes; 4-D ones, the 3 x 3 weights aside, are tokens."""
    def convert(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.to(tokens if x.dim() == 4 and x.shape[-2:] != (3, 3) else weights).detach().requires_grad_()

    return [convert(x) for x in inputs]


def check(name, inputs, dtype, weights=None):
    """y and all gradients are as accurate as the formula's."""
    given = with_types(inputs, dtype, weights or dtype)
    grad_y = torch.randn_like(getattr(reference, name)(*inputs)).to(dtype)
    with use_backend("triton"):
        results = layer_results(getattr(layers, name), given, grad_y)
    plain = layer_results(getattr(reference, name), with_types(inputs, dtype, dtype), grad_y)
    exact = layer_results(getattr(reference, name), with_types(given, torch.float64, torch.float64), grad_y)
    assert_accurate(results, plain, exact, floor=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "h", "w", "c"), [(4, 32, 32, 320), (4, 16, 16, 640), (4, 8, 8, 1280), (1, 24, 40, 320)])
@pytest.mark.parametrize("name", NAMES)
def test_full_size_matches_float64(name, b, h, w, c, dtype):
    scan_width = 2 * c if name in ("gated_norm", "local_mixing") else c
    check(name, make_inputs(name, b, h, w, scan_width), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "h", "w", "c"), [(3, 9, 10, 48), (1, 7, 3, 100)])
@pytest.mark.parametrize("name", NAMES[:-1])
def test_odd_sizes_match_float64(name, b, h, w, c, dtype):
    check(name, make_inputs(name, b, h, w, c), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "window", "d"), [
    ((12, 20), (8, 8), 4), ((12, 20), (8, 8), 64), ((9, 4), (4, 2), 33), ((3, 3), (3, 3), 20), ((7, 14), (7, 7), 17),
])
def test_odd_windows_match_float64(grid, window, d, dtype):
    check("window_attention", make_inputs("window_attention", 2, *grid, 3 * d, 3, window), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_float16_matches_float64(name):
    check(name, make_inputs(name, 2, 16, 16, 320), torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_16_bit_tokens_with_float32_parameters(name):
    if name == "gated_sum":
        pytest.skip("its gate comes from the same product as the norms' vectors, in the tokens' type")
    check(name, make_inputs(name, 2, 16, 16, 320), torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name):
    inputs = with_types(make_inputs(name, 4, 32, 32, 320), torch.bfloat16, torch.float32)
    if name == "gated_sum":
        inputs[2] = inputs[2].detach().bfloat16().requires_grad_()
    grad_y = torch.randn(4, 32, 32, 320, device="cuda", dtype=torch.bfloat16)
    with use_backend("triton"):
        runs = [layer_results(getattr(layers, name), inputs, grad_y) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("name", NAMES)
def test_triton_is_the_automatic_choice(name):
    inputs = with_types(make_inputs(name, 2, 8, 8, 320), torch.bfloat16, torch.bfloat16)
    assert "gpu" in type(getattr(layers, name)(*inputs).grad_fn).__name__
    with use_backend("torch"):
        assert "gpu" not in type(getattr(layers, name)(*inputs).grad_fn).__name__


def test_trains_inside_a_compiled_network():
    """Windows and local mixing are opaque steps of the compiled graph, the norm is Inductor's; gradients agree."""
    x, weight = with_types(make_inputs("local_mixing", 2, 8, 8, 60), torch.float32, torch.float32)
    _, bias, mask, *rest = make_inputs("window_attention", 2, 8, 8, 60, heads=3)
    project = torch.randn(180, 60, device="cuda") / 8

    def network(x, weight):
        x = layers.local_mixing(x, weight)
        x = layers.gated_norm(x, x, torch.ones(60, device="cuda"), torch.zeros(60, device="cuda"))
        return layers.window_attention(F.linear(x, project), bias, mask, *rest)

    grad_y = torch.randn(2, 8, 8, 60, device="cuda")
    expected = layer_results(network, (x, weight), grad_y)
    torch.compiler.reset()
    for ours, theirs in zip(layer_results(torch.compile(network), (x, weight), grad_y), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
