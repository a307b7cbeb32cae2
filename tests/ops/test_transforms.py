"""Every operator under torch.func, in forward mode and differentiated twice, against differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lamamba.ops import layers, selective_scan, use_backend
from tests.networks import random_inputs, random_network, relative_error, small_config
from tests.ops.test_layers import (
    few_rows_linear_inputs,
    gated_norm_inputs,
    gated_sum_inputs,
    local_mixing_inputs,
    modulated_norm_inputs,
    window_attention_inputs,
)


def scan_inputs(b=2, l=5, c=2, g=4, n=2, r=1):
    paths = torch.stack([torch.randperm(l) for _ in range(g)])
    return (torch.randn(b, l, c), torch.randn(b, l, g, r), torch.randn(b, l, g, n), torch.randn(b, l, g, n),
            torch.randn(g, c, r), torch.randn(g, c), -torch.rand(g, c, n), torch.randn(g, c), paths)


CASES = {
    "selective_scan": (selective_scan, scan_inputs),
    "modulated_norm": (layers.modulated_norm, lambda: modulated_norm_inputs(c=4)),
    "gated_norm": (layers.gated_norm, lambda: gated_norm_inputs(c=4)),
    "gated_sum": (layers.gated_sum, lambda: gated_sum_inputs(c=4)),
    "local_mixing": (layers.local_mixing, lambda: local_mixing_inputs(c=4)),
    "window_attention": (layers.window_attention, lambda: window_attention_inputs((4, 4), (2, 2), 1, 3)),
    "few_rows_linear": (layers.few_rows_linear, lambda: few_rows_linear_inputs(2, 8, 12)),
}


class Case:
    """An operator as a function f of its float32 tensors x, a direction v, and a weighting w of the output."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.run, make = CASES[name]
        self.inputs = make()
        self.places = [k for k, x in enumerate(self.inputs) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.x = tuple(self.inputs[k] for k in self.places)
        self.v = tuple(torch.randn_like(x) for x in self.x)
        self.w = torch.randn_like(self.f(*self.x))

    def f(self, *x):
        inputs = list(self.inputs)
        for place, part in zip(self.places, x, strict=True):
            inputs[place] = part
        return self.run(*inputs)

    def scalar(self, *x):
        return (self.f(*x) * self.w.to(x[0].dtype)).sum()

    def along(self, step):
        return self.scalar(*(x.double() + step * v.double() for x, v in zip(self.x, self.v, strict=True)))

    def first(self):
        return (self.along(1e-5) - self.along(-1e-5)) / 2e-5

    def second(self):
        return (self.along(1e-4) - 2 * self.along(0.0) + self.along(-1e-4)) / 1e-8

    def dot(self, parts):
        """Of gradients (or of Jacobians, whose leading axes stay) with the direction v."""
        return sum((part.flatten(part.dim() - v.dim()) @ v.flatten() for part, v in zip(parts, self.v, strict=True)))


def in_dual_level(case):
    with forward_ad.dual_level():
        y = case.scalar(*map(forward_ad.make_dual, case.x, case.v))
        return forward_ad.unpack_dual(y).tangent


def twice_backward(case):
    x = [part.clone().requires_grad_() for part in case.x]
    first = case.dot(torch.autograd.grad(case.scalar(*x), x, create_graph=True))
    return case.dot(torch.autograd.grad(first, x, materialize_grads=True))


def everything(case):
    return tuple(range(len(case.x)))


FIRST = {
    "grad": lambda case: case.dot(grad(case.scalar, everything(case))(*case.x)),
    "vjp": lambda case: case.dot(vjp(case.f, *case.x)[1](case.w)),
    "jvp": lambda case: (jvp(case.f, case.x, case.v)[1] * case.w).sum(),
    "jacrev": lambda case: (case.dot(jacrev(case.f, everything(case))(*case.x)) * case.w).sum(),
    "jacfwd": lambda case: (case.dot(jacfwd(case.f, everything(case))(*case.x)) * case.w).sum(),
    "dual numbers": in_dual_level,
}
SECOND = {
    "hessian": lambda case: case.dot([case.dot(row) for row in hessian(case.scalar, everything(case))(*case.x)]),
    "jvp of grad": lambda case: case.dot(jvp(grad(case.scalar, everything(case)), case.x, case.v)[1]),
    "backward twice": twice_backward,
}


@pytest.fixture(autouse=True)
def _kernel_for_every_size(monkeypatch):
    monkeypatch.setattr(layers, "MANY_WEIGHTS", 1)


@pytest.mark.parametrize("transform", [*FIRST, *SECOND])
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, transform):
    case = Case(name)
    expected = (case.first if transform in FIRST else case.second)()
    result = {**FIRST, **SECOND}[transform](case)
    assert float(result) == pytest.approx(float(expected), rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_vmap(name):
    case = Case(name)
    rows = [tuple(x * scale for x in case.x) for scale in (1.0, 0.5, 1.5)]
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    expected = torch.stack([case.f(*row) for row in rows])
    torch.testing.assert_close(vmap(case.f)(*stacked), expected, atol=1e-4, rtol=1e-4)
    some = vmap(case.f, in_dims=(0, *[None] * (len(case.x) - 1)))(stacked[0], *case.x[1:])
    torch.testing.assert_close(some[0], case.f(*case.x), atol=1e-4, rtol=1e-4)


def test_a_requested_kernel_is_not_replaced():
    case = Case("selective_scan")
    with pytest.raises(RuntimeError, match="selective_scan: back end 'cpu' has no rules for torch.func.*'torch'"), \
            use_backend("cpu"):
        jvp(case.f, case.x, case.v)
    with use_backend("torch"):
        assert (jvp(case.f, case.x, case.v)[1] * case.w).sum() == pytest.approx(float(case.first()), rel=1e-3)


@pytest.fixture
def network():
    return random_network(small_config(width=16))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_network_along_time(network, with_gradients):
    """d/dt u(x_t, t), as MeanFlow trains with (arXiv 2505.13447)."""
    x, t, labels = random_inputs(network.architecture)
    v = torch.randn_like(x)
    with torch.set_grad_enabled(with_gradients):
        network(x, t, labels)                                                   # fills what is cached
        output, tangent = jvp(lambda x, t: network(x, t, labels), (x, t), (v, torch.ones_like(t)))
    assert tangent.requires_grad == with_gradients
    network.double()
    with torch.no_grad():
        above, below = (network(x.double() + s * v, t.double() + s, labels) for s in (1e-3, -1e-3))
    assert relative_error(output, network(x.double(), t, labels).detach()) < 1e-5
    assert relative_error(tangent, (above - below) / 2e-3) < 1e-3


def test_gradients_of_each_sample(network):
    x, t, labels = random_inputs(network.architecture)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss(weights, x, t, label):
        return functional_call(network, weights, (x[None], t[None], label[None])).square().mean()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, x, t, labels)
    network(x[:1], t[:1], labels[:1]).square().mean().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(each[name][0], parameter.grad, atol=1e-5, rtol=1e-3)
