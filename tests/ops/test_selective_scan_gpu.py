"""The Triton scan on a GPU at the sizes of LaMamba-XL: values and gradients."""

from __future__ import annotations

import pytest
import torch

from lamamba.ops.scan_paths import scan_paths
from lamamba.ops.selective_scan import OP, chunked, reference, selective_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RESULTS = ("y", "x", "dt", "B", "C", "W_dt", "b_dt", "A", "D")


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    from lamamba.ops.selective_scan import triton_kernels

    torch.use_deterministic_algorithms(True, warn_only=True)                    # fills fresh memory with NaN
    yield triton_kernels
    torch.use_deterministic_algorithms(False)


def make_inputs(b, height, width, c, n, r, dtype, weights=None):
    """Inputs at the scale of a fresh network: delta log-uniform in [0.001, 0.1], A about -1..-n."""
    random = torch.Generator("cuda").manual_seed(7)
    l, g = height * width, 4

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda")

    def uniform(*shape):
        return torch.rand(shape, generator=random, device="cuda")

    delta = torch.exp(uniform(g, c) * 4.6 - 6.9)
    b_dt = delta + torch.log(-torch.expm1(-delta))
    A = -torch.arange(1, n + 1, device="cuda") * (0.5 + uniform(g, c, n))
    tokens = [normal(b, l, c), normal(b, l, g, r), normal(b, l, g, n), normal(b, l, g, n)]
    parameters = [(2 * uniform(g, c, r) - 1) / r**0.5, b_dt, A, normal(g, c)]
    tensors = [t.to(dtype) for t in tokens] + [t.to(weights or dtype) for t in parameters]
    return [*tensors, scan_paths(height, width, device="cuda")], normal(b, l, c).to(dtype)


def run_all(backend, inputs, grad_y, **kwargs):
    return [backend.forward(*inputs, **kwargs), *backend.backward(grad_y, *inputs, **kwargs)]


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def check_against_float64(kernels, inputs, grad_y, **kwargs):
    """Every result has at most twice the error of PyTorch's in the same dtype (or a few units in the last place)."""
    dtype = inputs[0].dtype
    results = run_all(kernels, inputs, grad_y, **kwargs)
    plain = run_all(chunked, [t.to(dtype) if t.is_floating_point() else t for t in inputs], grad_y)
    exact = run_all(chunked, [t.double() if t.is_floating_point() else t for t in inputs], grad_y.double())
    errors = {
        name: (relative_error(ours, truth), 2 * max(relative_error(theirs, truth), 5e-7))
        for name, ours, theirs, truth in zip(RESULTS, results, plain, exact, strict=True)
    }
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not wrong, f"(error, allowed): {wrong}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize(
    ("b", "height", "width", "c", "r"),
    [(8, 32, 32, 640, 20), (8, 16, 16, 1280, 40), (8, 8, 8, 2560, 80), (1, 64, 64, 640, 20), (1, 24, 40, 640, 20)],
)
def test_full_size_matches_float64(kernels, b, height, width, c, r, n, dtype):
    check_against_float64(kernels, *make_inputs(b, height, width, c, n, r, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    ("b", "height", "width", "c", "r"), [(1, 1, 1, 1, 1), (3, 3, 5, 48, 5), (2, 1, 13, 100, 7), (1, 7, 11, 33, 17)]
)
def test_odd_sizes_match_float64(kernels, b, height, width, c, r, n, dtype):
    check_against_float64(kernels, *make_inputs(b, height, width, c, n, r, dtype))


@pytest.mark.parametrize("segments", [1, 2, 7])
def test_segments_match_float64(kernels, segments):
    check_against_float64(kernels, *make_inputs(1, 23, 29, 100, 2, 20, torch.float32), segments=segments)


def test_16_bit_tokens_with_float32_parameters(kernels):
    check_against_float64(kernels, *make_inputs(4, 32, 32, 640, 1, 20, torch.bfloat16, torch.float32))


@pytest.mark.parametrize("n", [1, 16])
def test_two_runs_give_the_same_bits(kernels, n):
    inputs, grad_y = make_inputs(2, 32, 32, 640, n, 20, torch.bfloat16)
    for first, second in zip(*(run_all(kernels, inputs, grad_y) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_visible(kernels, value):
    inputs, _ = make_inputs(1, 5, 7, 48, 2, 5, torch.float32)
    inputs[0][0, 3, 5] = value
    expected = torch.isfinite(reference.forward(*inputs))
    assert torch.equal(torch.isfinite(kernels.forward(*inputs)), expected)


def test_is_the_automatic_choice_and_has_gradients(kernels):
    inputs, grad_y = make_inputs(1, 8, 8, 64, 1, 4, torch.bfloat16)
    assert OP.choose(inputs[0], 1) == "triton"
    leaves = [t.requires_grad_() for t in inputs[:-1]]
    selective_scan(*inputs).backward(grad_y)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
