"""The compiled CPU layers against the reference in float64: at most twice the error of the reference in their dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamamba.models.geometry import make_geometry
from lamamba.ops import layers, native, use_backend
from lamamba.ops.layers import cpu, reference
from tests.ops.test_selective_scan import make_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = [16, 48, 100, 7, 1]
GRIDS = [((8, 16), (8, 8)), ((16, 8), (8, 4)), ((6, 7), (4, 4)), ((9, 4), (4, 2)), ((3, 3), (3, 3)), ((7, 14), (7, 7))]


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)                                        # errors are compared with those of the reference


def modulated_norm_inputs(b=2, h=3, w=5, c=16, affine=True):
    vectors = torch.randn(b, 3 * c)                             # shift and scale come as parts of a wider tensor
    weight, bias = (torch.randn(c), torch.randn(c)) if affine else (None, None)
    return 3 * torch.randn(b, h, w, c) + 1, weight, bias, vectors[:, c : 2 * c], vectors[:, 2 * c :], 1e-5


def gated_sum_inputs(b=2, h=3, w=5, c=16):
    return torch.randn(b, h, w, c), torch.randn(b, h, w, c), torch.randn(b, 3 * c)[:, c : 2 * c]


def gated_sum_norm_inputs(b=2, h=3, w=5, c=16, affine=True):
    x, weight, bias, shift, scale, eps = modulated_norm_inputs(b, h, w, c, affine)
    return x, torch.randn_like(x), torch.randn(b, 3 * c)[:, c : 2 * c], weight, bias, shift, scale, eps


def linear_gelu_inputs(b=2, h=3, w=5, c=16, width=64):
    return torch.randn(b, h, w, c), torch.randn(width, c) * c**-0.5, torch.randn(width)


def gated_norm_inputs(b=2, h=3, w=5, c=16):
    z = torch.randn(b, h, w, 2 * c).chunk(2, dim=-1)[1]
    return torch.randn(b, h, w, c), z, torch.randn(c), torch.randn(c), 1e-5


def scan_gated_norm_inputs(b=2, h=3, w=5, c=16, n=2):
    x, z, weight, bias, eps = gated_norm_inputs(b, h, w, c)
    scan = list(make_inputs(b, h, w, c, n).values())[1:]
    return x, z, *scan, weight, bias, eps


def local_mixing_inputs(b=2, h=3, w=5, c=16):
    x = torch.randn(b, h, w, 2 * c).chunk(2, dim=-1)[0]
    return x, torch.randn(c, 1, 3, 3)


def few_rows_linear_inputs(rows=3, inputs=32, outputs=48):
    return torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)


def window_attention_inputs(grid=(8, 16), window=(8, 8), num_heads=2, d=20, shifted=True, b=2):
    geometry, tokens = make_geometry(grid, window, "continuous"), window[0] * window[1]
    mask, shift = (geometry.shifted_mask, geometry.shift) if shifted else (geometry.mask, (0, 0))
    return (torch.randn(b, *grid, 3 * num_heads * d), torch.randn(num_heads, tokens, tokens), mask,
            num_heads, window, shift)


def check(name: str, inputs: tuple, dtype: torch.dtype) -> None:
    def as_type(to):
        return [x.to(dtype).to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]

    exact = getattr(reference, name)(*as_type(torch.float64))
    plain = getattr(reference, name)(*as_type(dtype))
    result = getattr(cpu, name)(*as_type(dtype))
    assert result.shape == exact.shape
    assert result.dtype == dtype
    floor = 4 * torch.finfo(dtype).eps * float(exact.abs().max())               # where the reference is exact by chance
    assert float((result - exact).abs().max()) <= max(3 * float((plain - exact).abs().max()), floor)


both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@both_types
@pytest.mark.usefixtures("instruction_set")
class TestAgainstFloat64:
    @pytest.mark.parametrize("c", WIDTHS)
    @pytest.mark.parametrize("affine", [True, False])
    def test_modulated_norm(self, c, affine, dtype):
        check("modulated_norm", modulated_norm_inputs(c=c, affine=affine), dtype)

    @pytest.mark.parametrize("c", WIDTHS)
    def test_gated_norm(self, c, dtype):
        check("gated_norm", gated_norm_inputs(c=c), dtype)

    @pytest.mark.parametrize("c", WIDTHS)
    @pytest.mark.parametrize(("h", "w"), [(3, 5), (1, 1), (1, 4), (4, 1)])
    def test_local_mixing(self, c, h, w, dtype):
        check("local_mixing", local_mixing_inputs(c=c, h=h, w=w), dtype)

    @pytest.mark.parametrize("shifted", [False, True])
    @pytest.mark.parametrize("d", [20, 5, 16])
    @pytest.mark.parametrize(("grid", "window"), GRIDS)
    def test_window_attention(self, grid, window, d, shifted, dtype):
        check("window_attention", window_attention_inputs(grid, window, d=d, shifted=shifted), dtype)

    @pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 13])
    @pytest.mark.parametrize(("inputs", "outputs"), [(32, 48), (37, 19), (1, 1)])
    def test_few_rows_linear(self, rows, inputs, outputs, dtype):
        check("few_rows_linear", few_rows_linear_inputs(rows, inputs, outputs), dtype)

    def test_wide_heads(self, dtype):
        check("window_attention", window_attention_inputs(d=80), dtype)

    def test_many_threads(self, dtype, monkeypatch):
        """With a number of threads that does not divide the tokens."""
        monkeypatch.setattr(native, "num_threads", lambda: 3)
        check("modulated_norm", modulated_norm_inputs(h=20, w=11, c=48), dtype)
        check("gated_norm", gated_norm_inputs(h=20, w=11, c=48), dtype)
        check("local_mixing", local_mixing_inputs(h=20, w=11, c=48), dtype)
        check("window_attention", window_attention_inputs((24, 24), d=12), dtype)
        check("few_rows_linear", few_rows_linear_inputs(5, 300, 111), dtype)


@both_types
@pytest.mark.usefixtures("instruction_set")
class TestNotANumber:
    """NaN and infinity propagate as in the formula, and nowhere else."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_in_rows(self, value, dtype):
        x, weight, bias = few_rows_linear_inputs()
        x[1, 4] = value
        y = cpu.few_rows_linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        assert not y[1].isfinite().any()
        assert y[::2].isfinite().all()
        for name, inputs in (("modulated_norm", modulated_norm_inputs()), ("gated_norm", gated_norm_inputs())):
            inputs[0][1, 2, 3, 4] = value
            x, *rest = (part.to(dtype) if isinstance(part, torch.Tensor) else part for part in inputs)
            y = getattr(cpu, name)(x, *rest)
            assert y[1, 2, 3].isnan().all()
            y[1, 2, 3] = 0
            assert y.isfinite().all()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_in_local_mixing(self, value, dtype):
        x, weight = local_mixing_inputs(h=5, w=6)
        x[1, 2, 3, 4] = value
        y = cpu.local_mixing(x.to(dtype), weight.abs().to(dtype))
        around = torch.zeros(y.shape, dtype=torch.bool)
        around[1, 1:4, 2:5, 4] = True
        assert y[~around].isfinite().all()
        if value > 0 or math.isnan(value):
            assert not y[around].isfinite().any()

    @pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
    def test_in_window_attention(self, part, dtype):
        qkv, *rest = window_attention_inputs(grid=(16, 16), shifted=False)
        qkv[0, 1, 2, part * 40 + 3] = math.nan                                  # in head 0 of window 0
        y = cpu.window_attention(qkv.to(dtype), *rest)
        reached = torch.zeros(y.shape, dtype=torch.bool)
        reached[0, :8, :8, :20] = True
        assert y[~reached].isfinite().all()
        assert y[0, 1, 2, 3].isnan()


class Halved(torch.Tensor):
    """Stores twice its value, as a wrapper without memory of its own."""

    @staticmethod
    def __new__(cls, doubled):
        return torch.Tensor._make_wrapper_subclass(cls, doubled.shape, dtype=doubled.dtype)

    def __init__(self, doubled):
        self.doubled = doubled

    def __tensor_flatten__(self):
        return ["doubled"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(x.doubled / 2 if isinstance(x, Halved) else x for x in args), **(kwargs or {}))


class TestChoice:
    """Compiled kernels run where they are supported, the formula elsewhere."""

    @pytest.fixture
    def calls(self, monkeypatch):
        if native.load() is None:
            pytest.skip("no compiled kernels")
        seen = []
        run = cpu._run
        monkeypatch.setattr(cpu, "_run", lambda *inputs: (seen.append(inputs[0]), run(*inputs))[1])
        return seen

    @torch.no_grad()
    def test_without_gradients(self, calls):
        layers.gated_norm(*gated_norm_inputs())
        assert calls

    @pytest.mark.parametrize("name", ["torch", "reference"])
    def test_not_where_another_back_end_is_requested(self, calls, name):
        with use_backend(name):
            layers.gated_norm(*gated_norm_inputs())
        assert not calls
        with use_backend("cpu"):
            layers.gated_norm(*gated_norm_inputs())
        assert calls

    @torch.no_grad()
    @pytest.mark.parametrize(("rows", "dtype", "runs"), [
        (8, torch.float32, True), (9, torch.float32, False), (2, torch.bfloat16, True), (3, torch.bfloat16, False),
    ])
    def test_only_for_few_rows(self, calls, rows, dtype, runs):
        inputs = [part.to(dtype) for part in few_rows_linear_inputs(rows, 512, 512)]
        torch.testing.assert_close(layers.few_rows_linear(*inputs), reference.few_rows_linear(*inputs),
                                   rtol=2e-2, atol=1e-3)
        assert bool(calls) == runs

    @torch.no_grad()
    def test_not_for_weights_of_another_class(self, calls):
        """As quantised ones are: a tensor that computes by itself."""
        x, weight, bias = few_rows_linear_inputs(2, 512, 512)
        y = layers.few_rows_linear(x, Halved(weight), bias)
        torch.testing.assert_close(y, reference.few_rows_linear(x, weight / 2, bias), rtol=1e-4, atol=1e-4)
        assert not calls

    def test_not_with_gradients_nor_in_other_types(self, calls):
        x, z, weight, bias, eps = gated_norm_inputs()
        layers.gated_norm(x, z, weight.requires_grad_(), bias, eps).sum().backward()
        assert weight.grad is not None
        layers.gated_norm(x.double(), z.double(), weight.detach().double(), bias.double(), eps)
        layers.gated_norm(x.bfloat16(), z.bfloat16(), weight.detach(), bias, eps)
        layers.gated_norm(x[:0], z[:0], weight.detach(), bias, eps)
        assert not calls


@torch.no_grad()
def test_compiled_kernels_count_the_operations_of_the_formulas():
    def count(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    qkv, bias, mask, *rest = window_attention_inputs((8, 16), b=1, shifted=False)
    x, weight = local_mixing_inputs()
    cases = {"window_attention": (qkv, bias, mask, *rest), "local_mixing": (x, weight),
             "few_rows_linear": few_rows_linear_inputs(3, 512, 512)}
    for name, inputs in cases.items():
        on_meta = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in inputs]
        assert count(lambda name=name, inputs=inputs: getattr(layers, name)(*inputs)) == count(
            lambda name=name, inputs=on_meta: getattr(layers, name)(*inputs)) > 0
