"""The Triton scan under Triton's interpreter on the CPU: values and gradients, without a GPU.

The interpreter is chosen when a kernel is decorated, so these tests run in a process of their own:
TRITON_INTERPRET=1 pytest tests/ops/test_triton_interpreter.py shows them one by one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.accuracy import GRADIENTS, check_scan, relative_error, scan_inputs, scan_results

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_everything_under_the_interpreter")

if INTERPRETED:
    from lamamba.ops import use_backend
    from lamamba.ops.selective_scan import reference, selective_scan, triton_kernels


FEW = {
    "test_triton_interpreter.py": (
        "test_float32_matches_float64[1-1-1-1-1-1-continuous]", "test_is_the_named_back_end_of_the_op",
        "test_unsupported_inputs_have_a_reason", "test_rates_with_channels_innermost_give_the_same_bits",
    ),
    "test_layers_interpreter.py": (
        "TestAgainstFloat64::test_modulated_norm[1-1-1-1-True]", "TestAgainstFloat64::test_gated_norm_and_sum[1-1-1-1]",
        "TestAgainstFloat64::test_local_mixing[1-1-9-7]", "TestAgainstFloat64::test_padding_that_no_mask_hides",
        "TestWithoutGradients::test_gated_sum_norm[1-1-1-1-True]",
        "TestWithoutGradients::test_linear_gelu[sizes1-dtype0]", "test_only_the_named_back_end_runs_on_cpus",
    ),
    "test_fakes.py": (
        *(f"test_triton_layers[{name}-2-dense-mixed]" for name in (
            "modulated_norm", "gated_norm", "gated_sum", "local_mixing", "window_attention")),
        "test_triton_scan[2-dense-float32]", "test_triton_scan[0-dense-float32]",
        "test_an_empty_batch_is_one_segment_on_a_gpu",
    ),
}
"""Every kernel once, forward and backward, at small shapes; the rest is in `make slow`."""


def run_under_the_interpreter(*tests):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *map(str, tests)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_every_kernel_once_under_the_interpreter():
    folder = Path(__file__).parent
    run_under_the_interpreter(*(folder / f"{file}::{name}" for file, names in FEW.items() for name in names))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("file", FEW)
def test_everything_under_the_interpreter(file):
    run_under_the_interpreter(Path(__file__).parent / file)


def check_against_float64(inputs, grad_y, **options):
    check_scan(triton_kernels, reference, inputs, grad_y, **options)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("b", "height", "width", "c", "n", "r", "scan"),
    [
        (1, 1, 1, 1, 1, 1, "continuous"),                                       # one token, one channel
        (2, 3, 5, 48, 1, 5, "continuous"),                                      # odd length, several images
        (1, 1, 13, 100, 2, 20, "continuous"),                                   # prime length, two blocks of channels
        (1, 7, 3, 20, 3, 3, "cross"),
        (1, 5, 4, 33, 4, 17, "continuous"),
        (1, 3, 3, 6, 8, 2, "continuous"),
        (1, 2, 5, 5, 16, 4, "cross"),
        (1, 2, 4, 64, 1, 15, "continuous"),                                     # whole tiles, without masks
        (2, 4, 2, 32, 2, 16, "continuous"),
    ],
)
def test_float32_matches_float64(b, height, width, c, n, r, scan):
    check_against_float64(*scan_inputs(b, height, width, c, n, r, scan=scan))


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_rates_with_channels_innermost_give_the_same_bits():
    (x, dt, B, C, W_dt, b_dt, A, D, paths), _ = scan_inputs(1, 2, 3, 5, 2, 3)
    with use_backend("triton"), torch.no_grad():
        innermost = selective_scan(x, dt, B, C, W_dt, b_dt, A.mT.contiguous().mT, D, paths)
        assert torch.equal(innermost, selective_scan(x, dt, B, C, W_dt, b_dt, A, D, paths))


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "n"), [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float16, 1)])
def test_16_bits_match_float64(dtype, n):
    check_against_float64(*scan_inputs(1, 3, 5, 20, n, 20, dtype=dtype))


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("weights", "r"), [(torch.bfloat16, 40), (torch.float32, 5), (torch.float32, 20)])
def test_whole_tiles_of_16_bits_match_float64(weights, r):
    """Of weights in one and in three parts, that stay in registers or are too many."""
    check_against_float64(*scan_inputs(1, 2, 8, 64, 1, r, dtype=torch.bfloat16, weights=weights))


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("l", [11, 16])
def test_paths_are_any_permutations_of_views_of_one_projection(l):
    (x, dt, B, C, *parameters, _), grad_y = scan_inputs(2, 1, l, 20, 2, 3)
    dt, B, C = torch.cat([dt, B, C], -1).split([3, 2, 2], -1)
    paths = torch.stack([torch.randperm(l, generator=torch.Generator().manual_seed(k)) for k in range(4)])
    check_against_float64([x, dt, B, C, *parameters, paths], grad_y)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_16_bit_tokens_with_float32_parameters_lose_nothing_of_the_parameters():
    inputs, grad_y = scan_inputs(1, 3, 5, 20, 2, 5, dtype=torch.bfloat16, weights=torch.float32)
    check_against_float64(inputs, grad_y)
    exact = scan_results(reference, [t.double() if t.is_floating_point() else t for t in inputs], grad_y.double())
    gradients = dict(zip(("y", *GRADIENTS), scan_results(triton_kernels, inputs, grad_y), strict=True))
    for name, truth in zip(("y", *GRADIENTS), exact, strict=True):
        if name in ("b_dt", "A", "D"):
            assert relative_error(gradients[name], truth) < 2e-6, name


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("segments", [2, 5])
def test_a_path_may_be_cut_into_segments(segments):
    check_against_float64(*scan_inputs(1, 3, 7, 20, 2, 5), segments=segments)


@interpreted
def test_reads_inputs_with_gaps():
    inputs, grad_y = scan_inputs(1, 2, 2, 20, 1, 5)
    gapped = [t.repeat_interleave(2, -1)[..., ::2] if t.is_floating_point() else t for t in inputs]
    assert not gapped[0].is_contiguous()
    expected = scan_results(triton_kernels, inputs, grad_y)
    for ours, theirs in zip(scan_results(triton_kernels, gapped, grad_y.mT.contiguous().mT), expected, strict=True):
        assert torch.equal(ours, theirs)


@interpreted
def test_two_runs_give_the_same_bits():
    inputs, grad_y = scan_inputs(1, 2, 2, 40, 1, 5)
    for first, second in zip(*(scan_results(triton_kernels, inputs, grad_y) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", GRADIENTS)
def test_nan_and_infinity_stay_visible(value, name):
    inputs, _ = scan_inputs(1, 1, 3, 5, 1, 3)
    broken = inputs[GRADIENTS.index(name)]
    broken[(0,) * broken.dim()] = value
    y, expected = triton_kernels.forward(*inputs), reference.forward(*inputs)
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_extreme_time_steps_match_float64():
    inputs, grad_y = scan_inputs(1, 3, 3, 5, 2, 3)
    inputs[5][:, 0], inputs[5][:, 1], inputs[5][:, 2] = 300.0, -60.0, -1000.0
    check_against_float64(inputs, grad_y)


@interpreted
def test_is_the_named_back_end_of_the_op():
    inputs, grad_y = scan_inputs(1, 2, 3, 5, 1, 3)
    inputs[0].requires_grad_()
    y = selective_scan(*inputs, backend="triton")
    y.backward(grad_y)
    torch.testing.assert_close(inputs[0].grad, reference.backward(grad_y, *(t.detach() for t in inputs))[0])


@interpreted
def test_unsupported_inputs_have_a_reason():
    assert triton_kernels.unsupported_reason("cpu", torch.float32, 16) is None
    assert "at most 16" in triton_kernels.unsupported_reason("cpu", torch.float32, 17)
    assert "not float64" in triton_kernels.unsupported_reason("cpu", torch.float64, 1)
