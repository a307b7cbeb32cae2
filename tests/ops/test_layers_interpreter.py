"""The Triton layers under Triton's interpreter on the CPU: values and gradients, without a GPU.

The interpreter is chosen when a kernel is decorated, so test_triton_interpreter.py runs these in another process:
TRITON_INTERPRET=1 pytest tests/ops/test_layers_interpreter.py shows them one by one.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from lamamba.inference.conditioning import ConditionedNetwork
from lamamba.ops import layers, use_backend
from lamamba.ops.layers import gpu, reference
from lamamba.ops.selective_scan import reference as scan_reference
from tests.networks import random_inputs, random_network, two_blocks
from tests.ops.accuracy import assert_accurate, layer_results, relative_error
from tests.ops.test_layers import (
    gated_norm_inputs,
    gated_sum_inputs,
    gated_sum_norm_inputs,
    linear_gelu_inputs,
    local_mixing_inputs,
    modulated_norm_inputs,
    scan_gated_norm_inputs,
    window_attention_inputs,
)

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_triton_interpreter.py")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(3)                                        # errors are compared with those of the reference


@pytest.fixture
def calls(monkeypatch):
    """Names of the layers whose kernels run."""
    names, run = [], gpu._kernels
    monkeypatch.setattr(gpu, "_kernels", lambda name: (names.append(name), run(name))[1])
    return names


CASES = {
    "modulated_norm": modulated_norm_inputs, "gated_norm": gated_norm_inputs, "gated_sum": gated_sum_inputs,
    "local_mixing": local_mixing_inputs, "window_attention": lambda: window_attention_inputs((6, 4), (4, 4), d=20),
}
INFERENCE_CASES = {
    "gated_sum_norm": gated_sum_norm_inputs, "linear_gelu": linear_gelu_inputs,
    "scan_gated_norm": scan_gated_norm_inputs,
}
"""Layers that have no gradients."""


def scan_gated_norm(x, z, *rest):
    *scan, weight, bias, eps = rest
    y = scan_reference.forward(x.flatten(1, 2), *scan).view(x.shape)
    return reference.gated_norm(y, z, weight, bias, eps)


def call(name):
    """A layer as a function of its operator's arguments."""
    if name != "scan_gated_norm":
        return getattr(layers, name)
    return lambda x, z, *rest: layers.scan_gated_norm(x, z, rest[:8], *rest[8:])


FORMULAS = {name: getattr(reference, name, scan_gated_norm) for name in INFERENCE_CASES}


def with_type(inputs, dtype, weights=None, tokens=None):
    """The floating-point inputs as leaves of other dtypes; vectors may have one of their own."""
    def convert(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        rounded = x.to(dtype if x.dim() == 4 and x.shape[-1] != 3 else weights or dtype)
        return rounded.to(tokens or rounded.dtype).requires_grad_()

    return [convert(x) for x in inputs]


def check(name, inputs, dtype=torch.float32, weights=None):
    """y and all gradients are as accurate as the formula's."""
    grad_y = torch.randn_like(getattr(reference, name)(*inputs)).to(dtype)
    with use_backend("triton"):
        results = layer_results(getattr(layers, name), with_type(inputs, dtype, weights), grad_y)
    plain = layer_results(getattr(reference, name), with_type(inputs, dtype), grad_y)
    exact = layer_results(getattr(reference, name), with_type(inputs, dtype, weights, torch.float64), grad_y)
    differentiable = [x for x in with_type(inputs, dtype, weights) if isinstance(x, torch.Tensor) and x.requires_grad]
    for index, (ours, truth) in enumerate(zip(results, exact, strict=True)):
        assert ours.shape == truth.shape, index
        assert ours.dtype == (differentiable[index - 1].dtype if index else dtype), index
    assert_accurate(results, plain, exact)


@interpreted
class TestAgainstFloat64:
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize(("b", "h", "w", "c"), [(2, 3, 5, 48), (1, 1, 1, 1), (3, 2, 3, 100)])
    def test_modulated_norm(self, b, h, w, c, affine):
        check("modulated_norm", modulated_norm_inputs(b, h, w, c, affine))

    @pytest.mark.parametrize(("b", "h", "w", "c"), [(2, 3, 5, 48), (1, 1, 1, 1), (3, 2, 3, 100)])
    def test_gated_norm_and_sum(self, b, h, w, c):
        check("gated_norm", gated_norm_inputs(b, h, w, c))
        check("gated_sum", gated_sum_inputs(b, h, w, c))

    @pytest.mark.parametrize(("b", "h", "w", "c"), [(1, 9, 10, 20), (1, 1, 1, 1), (2, 4, 1, 65), (1, 1, 9, 7)])
    def test_local_mixing(self, b, h, w, c):
        check("local_mixing", local_mixing_inputs(b, h, w, c))

    @pytest.mark.parametrize(("grid", "window", "d", "shifted"), [
        ((16, 8), (8, 8), 20, True), ((8, 8), (8, 8), 4, False), ((6, 7), (4, 4), 5, True), ((9, 4), (4, 2), 33, False),
        ((3, 3), (3, 3), 64, True), ((7, 10), (7, 7), 17, True), ((1, 1), (1, 1), 1, False),
    ])
    def test_window_attention(self, grid, window, d, shifted):
        check("window_attention", window_attention_inputs(grid, window, d=d, shifted=shifted, b=1))

    def test_padding_that_no_mask_hides(self):
        qkv, bias, _, *rest = window_attention_inputs((5, 7), (4, 4), d=6, b=2)
        check("window_attention", (qkv, bias, None, *rest))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", CASES)
    def test_16_bits(self, name, dtype):
        check(name, CASES[name](), dtype)

    @pytest.mark.parametrize("name", [name for name in CASES if name != "gated_sum"])
    def test_16_bit_tokens_with_float32_parameters(self, name):
        check(name, CASES[name](), torch.bfloat16, torch.float32)


    def test_16_bit_branch_added_to_a_float32_sum(self):
        """As under autocast."""
        x, y, gate = gated_sum_inputs()
        leaves = [x.requires_grad_(), y.bfloat16().requires_grad_(), gate.bfloat16().requires_grad_()]
        grad = torch.randn_like(x)
        with use_backend("triton"):
            ours = layer_results(layers.gated_sum, leaves, grad)
        exact = layer_results(reference.gated_sum, [leaf.detach().double().requires_grad_() for leaf in leaves], grad)
        for value, truth, dtype, allowed in zip(
            ours, exact, [torch.float32] * 2 + [torch.bfloat16] * 2, [1e-7, 1e-7, 3e-3, 3e-3], strict=True
        ):
            assert value.dtype == dtype
            assert relative_error(value, truth) < allowed


def check_outputs(name, inputs, dtype=torch.float32):
    """As `check`, for a layer without gradients."""
    def outputs(function, tokens=None):
        found = function(*(x.detach() if isinstance(x, torch.Tensor) else x
                           for x in with_type(inputs, dtype, None, tokens)))
        return found if isinstance(found, tuple) else (found,)

    formula = FORMULAS[name]
    with use_backend("triton"):
        results = outputs(call(name))
    exact = outputs(formula, torch.float64)
    for ours, truth in zip(results, exact, strict=True):
        assert (ours.shape, ours.dtype) == (truth.shape, dtype)
    assert_accurate(results, outputs(formula), exact)


@interpreted
class TestWithoutGradients:
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize(("b", "h", "w", "c"), [(2, 3, 5, 48), (1, 1, 1, 1), (3, 2, 3, 100)])
    def test_gated_sum_norm(self, b, h, w, c, affine):
        check_outputs("gated_sum_norm", gated_sum_norm_inputs(b, h, w, c, affine))

    @pytest.mark.parametrize(("b", "h", "w", "c"), [(2, 3, 5, 48), (1, 1, 1, 1), (3, 2, 3, 100)])
    def test_scan_gated_norm(self, b, h, w, c):
        check_outputs("scan_gated_norm", scan_gated_norm_inputs(b, h, w, c))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", INFERENCE_CASES)
    def test_16_bits(self, name, dtype):
        check_outputs(name, INFERENCE_CASES[name](), dtype)

    @pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
    def test_16_bit_branch_with_float32_parameters(self, dtype, allowed):
        """As under autocast, where the sum has 16 bits, too, or 32."""
        x, y, gate, *rest = gated_sum_norm_inputs()
        x, y, gate = x.to(dtype), y.bfloat16(), gate.bfloat16()
        with use_backend("triton"):
            ours = layers.gated_sum_norm(x, y, gate, *rest)
        exact = reference.gated_sum_norm(*(
            part.double() if isinstance(part, torch.Tensor) else part for part in (x, y, gate, *rest)))
        for value, truth in zip(ours, exact, strict=True):
            assert value.dtype == dtype
            assert relative_error(value, truth) < allowed

    def test_the_sum_is_the_one_that_is_normalised(self):
        x, y, gate, *rest = (part.bfloat16() if isinstance(part, torch.Tensor) else part
                             for part in gated_sum_norm_inputs())
        with use_backend("triton"):
            total, normed = layers.gated_sum_norm(x, y, gate, *rest)
            assert torch.equal(normed, layers.modulated_norm(total, *rest))
        assert torch.equal(total, reference.gated_sum(x, y, gate))

    @pytest.mark.parametrize("name", INFERENCE_CASES)
    def test_is_a_well_formed_operator_and_gaps_do_not_matter(self, name):
        inputs = INFERENCE_CASES[name]()
        operator = getattr(torch.ops.lamamba, f"gpu_{name}").default
        torch.library.opcheck(operator, tuple(inputs), test_utils=("test_schema", "test_faketensor"))
        gapped = [x.repeat_interleave(2, -1)[..., ::2] if isinstance(x, torch.Tensor) else x for x in inputs]
        for ours, again in zip(operator(*inputs), operator(*gapped), strict=True):
            assert torch.equal(ours, again)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("sizes", [(2, 9, 9, 96, 200), (1, 1, 1, 1, 1), (3, 1, 130, 64, 128), (1, 33, 33, 8, 7)])
    def test_linear_gelu(self, sizes, dtype):
        check_outputs("linear_gelu", linear_gelu_inputs(*sizes), dtype)

    def test_gelu_is_in_the_product_where_it_is_worth_it(self, calls):
        x, weight, bias = (part.bfloat16() for part in linear_gelu_inputs())
        wide = [part.bfloat16() for part in linear_gelu_inputs(1, 1, 1, gpu.MOST_GELU_DEPTH + 1)]
        with use_backend("triton"):
            for inputs in ((x.float(), weight.float(), bias.float()), (x, weight.requires_grad_(), bias), wide):
                assert torch.equal(layers.linear_gelu(*inputs), reference.linear_gelu(*inputs))
            assert not calls
            with torch.no_grad():
                layers.linear_gelu(x, weight, bias)
        assert calls == ["linear_gelu"]

    def test_with_gradients_the_other_kernels_run(self, calls):
        inputs = with_type(gated_sum_norm_inputs(), torch.float32)
        with use_backend("triton"):
            total, normed = layers.gated_sum_norm(*inputs)
            assert calls == ["gated_sum", "modulated_norm"]
            with torch.no_grad():
                layers.gated_sum_norm(*inputs)
        assert calls == ["gated_sum", "modulated_norm", "gated_sum_norm"]
        torch.autograd.grad((total * normed).sum(), inputs[:3])

    def test_a_scan_is_summed_inside_the_norm_without_gradients_alone(self, calls):
        x, z, *rest = with_type(scan_gated_norm_inputs(), torch.float32)
        scan, norm = rest[:8], rest[8:]
        with use_backend("triton"):
            y = layers.scan_gated_norm(x, z, scan, *norm)
            assert calls == ["gated_norm"]
            torch.autograd.grad(y.sum(), [x, z])
            with torch.no_grad():
                torch.testing.assert_close(layers.scan_gated_norm(x, z, scan, *norm), y)
        assert calls[-1] == "scan_gated_norm"
        with torch.no_grad(), use_backend("torch"):
            torch.testing.assert_close(layers.scan_gated_norm(x, z, scan, *norm), y)
        with torch.no_grad(), use_backend("triton"), pytest.raises(ValueError, match="D has shape"):
            layers.scan_gated_norm(x, z, [*scan[:6], scan[6][1:], scan[7]], *norm)


@interpreted
@pytest.mark.parametrize("name", CASES)
class TestEveryLayer:
    def test_is_a_well_formed_operator(self, name):
        operator = getattr(torch.ops.lamamba, f"gpu_{name}").default
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, tuple(with_type(CASES[name](), torch.float32)), test_utils=tests)

    def test_two_runs_give_the_same_bits_and_gaps_do_not_matter(self, name):
        inputs = CASES[name]()
        grad_y = torch.randn_like(getattr(reference, name)(*inputs))
        gapped = [x.repeat_interleave(2, -1)[..., ::2] if isinstance(x, torch.Tensor) else x for x in inputs]
        with use_backend("triton"):
            first = layer_results(getattr(layers, name), with_type(inputs, torch.float32), grad_y)
            again = layer_results(getattr(layers, name), with_type(inputs, torch.float32), grad_y.mT.contiguous().mT)
            leaves = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                      for x in gapped]
            with_gaps = layer_results(getattr(layers, name), leaves, grad_y)
        for results in zip(first, again, with_gaps, strict=True):
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])

    def test_keeps_nothing_but_its_inputs(self, name):
        inputs = with_type(CASES[name](), torch.float32)
        kept = []
        with use_backend("triton"), saved_tensors_hooks(lambda x: (kept.append(x.data_ptr()), x)[1], lambda x: x):
            getattr(layers, name)(*inputs)
        given = [x.data_ptr() for x in inputs if isinstance(x, torch.Tensor)]
        assert kept
        assert set(kept) <= set(given)
        assert name != "gated_sum" or given[0] not in kept

    def test_runs_on_fake_tensors(self, name):
        leaves = with_type(CASES[name](), torch.float32)
        with FakeTensorMode() as mode, use_backend("triton"):
            inputs = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in leaves]
            differentiable = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
            y = getattr(layers, name)(*inputs)
            assert y.grad_fn is not None
            grads = torch.autograd.grad(y.sum(), differentiable)
        assert [grad.shape for grad in grads] == [x.shape for x in differentiable]

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_nan_and_infinity_stay_visible(self, name):
        inputs = CASES[name]()
        inputs[0][0, 1, 2, 3] = math.nan
        inputs[0][1, 2, 3, 5] = math.inf
        with use_backend("triton"), torch.enable_grad():
            inputs = with_type(inputs, torch.float32)
            ours = getattr(layers, name)(*inputs)
        assert torch.equal(ours.isfinite(), getattr(reference, name)(*inputs).isfinite())


@interpreted
class TestConstants:
    """What is computed from weights and grid alone changes nothing, whenever it was computed."""

    @pytest.mark.parametrize(("dtype", "state_size"), [(torch.float32, 1), (torch.bfloat16, 2)])
    def test_gives_the_same_bits(self, dtype, state_size):
        model = random_network(two_blocks(grid=(4, 4), state_size=state_size)).to(dtype)
        x, t, labels = random_inputs(model.architecture, batch=1)
        with torch.no_grad(), use_backend("triton"):
            rows = model.condition(t, labels)
            constants = model.make_constants(x.to(dtype))
            assert set(constants) == {f"{stage.name}.{i}" for stage in model._stages() for i in stage.blocks}
            plain = model(x.to(dtype), None, conditioning=rows)
            assert torch.equal(model(x.to(dtype), None, conditioning=rows, constants=constants), plain)

    def test_is_not_read_where_other_back_ends_run_nor_with_another_dtype(self):
        model = random_network(two_blocks(grid=(4, 4)))
        x, t, labels = random_inputs(model.architecture, batch=1)
        with torch.no_grad(), use_backend("triton"):
            constants = model.make_constants(x)
        for backend, bfloat16 in (("torch", False), ("triton", True)):
            with torch.no_grad(), use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                assert torch.equal(model(x, t, labels, constants=constants), model(x, t, labels))
        with torch.no_grad(), use_backend("torch"):
            assert model.make_constants(x) == {}
        with pytest.raises(ValueError, match="passes without gradients"):
            model(x, t, labels, constants=constants)

    def test_a_run_makes_them_once_and_anew_for_another_grid_or_adapter(self, monkeypatch):
        model, made = random_network(two_blocks(grid=(4, 4))), []
        make = model.make_constants
        monkeypatch.setattr(model, "make_constants", lambda x: made.append(x.shape) or make(x))
        x, _, labels = random_inputs(model.architecture, batch=1)
        network = ConditionedNetwork(model, [900.0], labels.tolist())
        t = torch.full((1,), 900.0)

        def follows_the_network() -> None:
            for _ in range(2):
                torch.testing.assert_close(network(x, t, labels), model(x, t, labels))

        with torch.no_grad(), use_backend("triton"):
            follows_the_network()
            assert len(made) == 1
            model.adapter_changes += 1                                          # as switching an adapter does
            model.encoder[0].blocks["1"].branches["scan"].A_log.data.add_(1.0)
            follows_the_network()
            assert len(made) == 2
            model.set_grid((4, 8))
            x = torch.cat([x, x], -1)
            follows_the_network()
            assert len(made) == 3


@interpreted
def test_only_the_named_back_end_runs_on_cpus(calls):
    inputs = with_type(gated_norm_inputs(), torch.float32)
    for backend in ("auto", "torch", "cpu", "reference"):
        with use_backend(backend):
            layers.gated_norm(*inputs)
    assert not calls
    with use_backend("triton"):
        layers.gated_norm(*inputs)
        layers.gated_norm(*with_type(inputs, torch.float64))                    # they take no float64
        layers.window_attention(*window_attention_inputs((9, 9), (9, 9), shifted=False))    # nor such large windows
    assert calls == ["gated_norm"]


@interpreted
def test_operations_are_counted_as_those_of_the_formulas():
    def count(name, inputs) -> int:
        with FlopCounterMode(display=False) as counter, use_backend("triton"):
            getattr(layers, name)(*inputs)
        return counter.get_total_flops()

    qkv, bias, mask, *rest = window_attention_inputs((8, 16), b=1, shifted=False)
    for name, inputs in {"window_attention": (qkv, bias, mask, *rest), "local_mixing": local_mixing_inputs()}.items():
        on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs]
        assert count(name, inputs) == count(name, on_meta) > 0


@interpreted
def test_compiled_networks_keep_the_formulas_of_norms_and_the_kernels_of_windows():
    targets = []

    def compiler(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def network(x, z, weight, bias, eps, attention):
        return layers.gated_norm(x, z, weight, bias, eps), layers.window_attention(*attention)

    torch.compiler.reset()
    inputs = *gated_norm_inputs(), with_type(window_attention_inputs(), torch.float32)
    with use_backend("triton"):
        torch.compile(network, fullgraph=True, backend=compiler)(*inputs)
    assert "lamamba.gpu_window_attention" in targets
    assert not any("gpu_gated_norm" in target for target in targets)
