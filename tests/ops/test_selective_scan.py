"""Every back end of the selective scan against the reference in float64.

Uninitialised memory is filled with NaN, so that results that were not written show.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamamba.ops import scan_paths, selective_scan
from lamamba.ops.selective_scan import OP, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = ("x", "dt", "B", "C", "W_dt", "b_dt", "A", "D")


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads are slow at such sizes, above all on a busy machine; the tests that need them set them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_inputs(b=1, height=4, width=4, c=8, n=1, r=2, g=4, dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    """Inputs at the scale of a new network: delta in 0.001 .. 0.1, A = -1 .. -n."""
    generator = torch.Generator().manual_seed(seed)
    l = height * width

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    delta = torch.exp(torch.rand((g, c), generator=generator) * math.log(100) + math.log(0.001))
    inputs = {
        "x": normal(b, l, c), "dt": normal(b, l, g, r), "B": normal(b, l, g, n), "C": normal(b, l, g, n),
        "W_dt": (2 * torch.rand((g, c, r), generator=generator) - 1) * r**-0.5,
        "b_dt": torch.log(torch.expm1(delta)),
        "A": -torch.arange(1.0, n + 1) * torch.exp(0.1 * normal(g, c, n)),
        "D": 1 + 0.1 * normal(g, c),
    }
    paths = torch.cat([scan_paths(height, width), scan_paths(height, width, "cross")])[:g]
    return {name: tensor.to(dtype) for name, tensor in inputs.items()} | {"paths": paths.contiguous()}


def run(inputs: dict[str, Tensor], grad_y: Tensor, backend: str) -> dict[str, Tensor]:
    """y and the gradient of every input, by name."""
    inputs = {name: tensor.detach().requires_grad_(name != "paths") for name, tensor in inputs.items()}
    y = selective_scan(**inputs, backend=backend)
    grads = torch.autograd.grad(y, [inputs[name] for name in NAMES], grad_y)
    return {"y": y.detach(), **{f"grad of {name}": grad for name, grad in zip(NAMES, grads, strict=True)}}


def draw_like(x: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def check_against_float64(inputs: dict[str, Tensor], backend: str) -> None:
    """At most twice the error of the reference in the inputs' own dtype."""
    grad_y = draw_like(inputs["x"])
    exact_inputs = {name: tensor if name == "paths" else tensor.double() for name, tensor in inputs.items()}
    exact = run(exact_inputs, grad_y.double(), "reference")
    plain = run(inputs, grad_y, "reference")
    for name, result in run(inputs, grad_y, backend).items():
        assert result.shape == exact[name].shape, name
        assert result.dtype == plain[name].dtype, name
        assert result.is_contiguous(), name
        for measure in (torch.linalg.vector_norm, lambda error: error.abs().max()):
            error, allowed = (measure(each.double() - exact[name]) for each in (result, plain[name]))
            last_bits = 2 * torch.finfo(torch.float32).eps * measure(exact[name])   # it may be exact by chance
            assert error <= 2 * allowed + last_bits, f"{name}: error {error:.2e}, plain PyTorch's {allowed:.2e}"


SHAPES = {
    "one token": dict(b=1, height=1, width=1, c=1, r=1),
    "a row": dict(b=2, height=1, width=13, c=5, r=2),
    "a column": dict(b=1, height=31, width=1, c=33, r=1),
    "odd and wide": dict(b=2, height=5, width=7, c=100, r=7),
    "even": dict(b=2, height=8, width=8, c=48, r=3),
    "many images": dict(b=9, height=2, width=3, c=16, r=1),
    "three paths": dict(b=1, height=6, width=11, c=70, r=20, g=3),
}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_recurrence_in_float64(backend, shape, n):
    check_against_float64(make_inputs(**shape, n=n), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 3])
def test_takes_half_precision_and_keeps_its_state_in_float32(backend, dtype, n):
    check_against_float64(make_inputs(b=2, height=9, width=7, c=37, n=n, r=5, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_takes_float32_parameters_with_half_precision_tokens(backend, dtype):
    inputs = make_inputs(b=2, height=6, width=6, c=40, n=2, r=3)
    for name in ("x", "dt", "B", "C"):
        inputs[name] = inputs[name].to(dtype)
    check_against_float64(inputs, backend)


def test_the_state_persists_over_a_long_path(backend):
    inputs = make_inputs(height=32, width=32, c=16, n=2)
    inputs["A"] /= 100                                          # the state outlives the path
    check_against_float64(inputs, backend)


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9), c=st.integers(1, 70), n=st.integers(1, 6),
    r=st.integers(1, 24), g=st.integers(1, 5), seed=st.integers(0, 2**31),
)
def test_any_shape(b, height, width, c, n, r, g, seed):
    inputs = make_inputs(b, height, width, c, n, r, g, seed=seed)
    grad_y = draw_like(inputs["x"])
    expected = run({k: v if k == "paths" else v.double() for k, v in inputs.items()}, grad_y.double(), "reference")
    for name, result in run(inputs, grad_y, OP.choose(inputs["x"], n)).items():
        torch.testing.assert_close(result.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_reads_tensors_that_are_views_of_others(backend):
    contiguous = make_inputs(b=2, height=5, width=4, c=24, n=2, r=3)
    views = dict(contiguous)
    views["x"] = torch.cat([contiguous["x"], draw_like(contiguous["x"])], 2).chunk(2, 2)[0]     # x beside z
    projected = torch.cat([contiguous[name] for name in ("dt", "B", "C")], 3)
    views["dt"], views["B"], views["C"] = projected.split([3, 2, 2], 3)
    for name in ("W_dt", "A", "b_dt", "D"):
        views[name] = contiguous[name].transpose(0, 1).contiguous().transpose(0, 1)
    views["paths"] = contiguous["paths"].T.contiguous().T
    assert not any(tensor.is_contiguous() for tensor in views.values())
    grad_y = torch.tensor(0.5).expand_as(contiguous["x"])
    expected = run(contiguous, grad_y.contiguous(), backend)
    for name, result in run(views, grad_y, backend).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-6, atol=1e-6, msg=name)

    views["x"] = contiguous["x"].transpose(1, 2).contiguous().transpose(1, 2)                   # channels far apart
    views["B"] = contiguous["B"].transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(run(views, grad_y, backend)["y"], expected["y"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_stay_visible(backend, name, value):
    inputs = make_inputs(b=2, height=3, width=4, c=20, n=2, r=2)
    inputs[name].view(-1)[inputs[name].numel() // 2] = value
    grad_y = draw_like(inputs["x"])
    expected = run(inputs, grad_y, "reference")
    for result_name, result in run(inputs, grad_y, backend).items():
        lost = ~expected[result_name].isfinite() & result.isfinite()
        assert not lost.any(), f"{result_name}: {int(lost.sum())} of its NaN and infinite numbers became finite"


def test_nan_in_the_gradient_stays_visible(backend):
    inputs = make_inputs(b=2, height=3, width=4, c=20, n=2, r=2)
    grad_y = draw_like(inputs["x"])
    grad_y[1, 5, 7] = math.nan
    expected, results = run(inputs, grad_y, "reference"), run(inputs, grad_y, backend)
    for name, result in results.items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name


def test_is_finite_where_steps_are_extreme(backend):
    """softplus and exp neither overflow nor change sign for large arguments."""
    inputs = make_inputs(b=1, height=4, width=4, c=32, n=2)
    inputs["b_dt"] = torch.linspace(-200, 200, 4 * 32).view(4, 32)
    inputs["A"] *= 1e4
    results = run(inputs, draw_like(inputs["x"]), backend)
    assert all(result.isfinite().all() for result in results.values())
    check_against_float64(inputs, backend)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gives_the_same_bits_every_time(backend, threads):
    inputs = make_inputs(b=3, height=8, width=8, c=100, n=2, r=5)
    grad_y = draw_like(inputs["x"])
    if backend == "cpu":                                        # the others use torch's sums
        torch.set_num_threads(threads)
    first = run(inputs, grad_y, backend)
    for _ in range(3):
        again = run(inputs, grad_y, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)
    torch.set_num_threads(1)
    for name, result in run(inputs, grad_y, backend).items():
        torch.testing.assert_close(first[name], result, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradients_agree_with_finite_differences(name):
    inputs = make_inputs(b=1, height=2, width=3, c=2, n=2, r=2, dtype=torch.float64)
    tensors = [inputs[each].requires_grad_() for each in NAMES]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, inputs["paths"], backend=name), tensors)


def test_is_a_well_registered_operator(backend):
    """Schema, fake implementation and autograd pass torch's opcheck."""
    torch.use_deterministic_algorithms(False)                   # opcheck compares uninitialised memory
    inputs = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in make_inputs(height=3, width=3).values()]
    torch.library.opcheck(torch.ops.lamamba.selective_scan.default, (*inputs, backend))


def test_an_empty_batch_gives_an_empty_result(backend):
    inputs = make_inputs(b=2)
    for name in ("x", "dt", "B", "C"):
        inputs[name] = inputs[name][:0]
    results = run(inputs, inputs["x"], backend)
    assert results["y"].shape == inputs["x"].shape
    assert not results["grad of A"].any()


def test_the_reference_follows_the_equations():
    """One channel, one state, one path of two tokens, by hand."""
    x, dt, B, C, W, b, A, D, step, decay = 2.0, 0.3, 0.7, -1.1, 0.5, -0.2, -0.9, 0.4, [], []
    y, h = [], 0.0
    for token in (1.0, 3.0):
        step = math.log1p(math.exp(W * dt * token + b))
        decay = math.exp(step * A)
        h = decay * h + step * B * x * token
        y.append(C * h + D * x * token)
    tokens = torch.tensor([1.0, 3.0], dtype=torch.float64)
    made = reference.forward(
        *((value * tokens).view(shape) for value, shape in ((x, (1, 2, 1)), (dt, (1, 2, 1, 1)))),
        *(torch.full((1, 2, 1, 1), value, dtype=torch.float64) for value in (B, C)),
        *(torch.full(shape, value, dtype=torch.float64) for value, shape in
          ((W, (1, 1, 1)), (b, (1, 1)), (A, (1, 1, 1)), (D, (1, 1)))),
        torch.tensor([[0, 1]]),
    )
    torch.testing.assert_close(made.flatten(), torch.tensor(y, dtype=torch.float64))
