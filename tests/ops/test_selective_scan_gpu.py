"""The Triton scan on a GPU at the sizes of LaMamba-XL: values and gradients."""

from __future__ import annotations

import functools

import pytest
import torch

from lamamba.ops.selective_scan import OP, chunked, reference, selective_scan
from tests.ops.accuracy import check_scan, scan_inputs, scan_results

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
make_inputs = functools.partial(scan_inputs, device="cuda", seed=7)


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    from lamamba.ops.selective_scan import triton_kernels

    return triton_kernels


def check_against_float64(kernels, inputs, grad_y, **options):
    """By PyTorch's chunked scan: the reference takes too long at such sizes."""
    check_scan(kernels, chunked, inputs, grad_y, floor=5e-7, **options)


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
    for first, second in zip(*(scan_results(kernels, inputs, grad_y) for _ in range(2)), strict=True):
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
