"""Real against fake results of every operator of ours: the shapes, strides and dtypes that torch.compile plans with.

Those of Triton run under its interpreter, in another process: see test_triton_interpreter.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lamamba.ops import native
from lamamba.ops.layers import gpu
from lamamba.ops.selective_scan import OP
from tests.ops import test_layers
from tests.ops.test_selective_scan import make_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_triton_interpreter.py")
compiled = pytest.mark.skipif(native.load() is None, reason="no compiled kernels")

LAYERS = [*gpu.SCHEMAS, "few_rows_linear"]
FLOATS = {
    "float32": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
"""dtypes of tokens and of parameters."""
STRIDES = {
    "dense": lambda x: x,
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}
floats = pytest.mark.parametrize(("tokens", "weights"), FLOATS.values(), ids=FLOATS)
strides = pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES)
images = pytest.mark.parametrize("b", [2, 0])


def layer_inputs(name, b, tokens, weights, change):
    """Arguments of a layer; tokens, and what is computed from them for each image, have the tokens' dtype."""
    torch.manual_seed(0)
    if name == "few_rows_linear":
        given = test_layers.few_rows_linear_inputs(rows=b)
        return [change(x.to(tokens)) for x in given]
    sizes = dict(grid=(8, 4), window=(4, 4)) if name == "window_attention" else dict(h=2, w=3)
    given = getattr(test_layers, f"{name}_inputs")(**sizes, b=b)
    changed = []
    for x in given:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            is_weight = x.shape[0] != b or x.dim() not in (2, 4)
            x = change(x.to(weights if is_weight else tokens))
        changed.append(x)
    return changed


def traits(outputs):
    """Shapes, strides and dtypes; an empty tensor is contiguous with any strides."""
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    return [(tuple(x.shape), x.stride() if x.numel() else (), x.dtype) for x in outputs]


def fake_traits(operator, *inputs):
    with FakeTensorMode() as mode:
        return traits(operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs)))


def check(operator, *inputs):
    """Also: of no images, all gradients are zero."""
    outputs = operator(*inputs)
    assert traits(outputs) == fake_traits(operator, *inputs)
    if len(inputs[0]) == 0:
        assert not any(x.any() for x in outputs)


def test_all_operators_are_tested_here():
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lamamba::")}
    tested = {f"lamamba::{name}" for name in LAYERS if name != "gated_sum"}
    tested |= {f"lamamba::gpu_{name}{end}" for name in gpu.SCHEMAS for end in ("", "_backward")}
    tested |= {f"lamamba::gpu_{name}" for name in gpu.INFERENCE_SCHEMAS}
    assert ours == tested | {"lamamba::selective_scan", "lamamba::selective_scan_backward"}


@compiled
@strides
@images
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "gated_sum"])
def test_layers_on_the_cpu(name, dtype, b, change):
    check(getattr(torch.ops.lamamba, name), *layer_inputs(name, b, dtype, dtype, change))


def scan_inputs(b, tokens, weights, change):
    inputs = make_inputs(b=2, height=2, width=3, c=5, n=2)
    for name in ("x", "dt", "B", "C"):
        inputs[name] = inputs[name][:b].to(tokens)
    for name in ("W_dt", "b_dt", "A", "D"):
        inputs[name] = inputs[name].to(weights)
    return [x if name == "paths" else change(x) for name, x in inputs.items()]


def check_scan(backend, b, tokens, weights, change):
    inputs = scan_inputs(b, tokens, weights, change)
    check(torch.ops.lamamba.selective_scan, *inputs, backend)
    check(torch.ops.lamamba.selective_scan_backward, change(inputs[0]), *inputs, backend)


@floats
@strides
@images
@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_scans_on_the_cpu(name, tokens, weights, b, change):
    if reason := OP.get(name).unsupported_reason("cpu", tokens, 2):
        pytest.skip(reason)
    check_scan(name, b, tokens, weights, change)


@interpreted
@floats
@strides
@images
@pytest.mark.parametrize("name", gpu.SCHEMAS)
def test_triton_layers(name, tokens, weights, b, change):
    inputs = layer_inputs(name, b, tokens, weights, change)
    operator = getattr(torch.ops.lamamba, f"gpu_{name}")
    check(operator, *inputs)
    grad_y = change(operator(*inputs).contiguous())
    needed = inputs[1:] if name == "gated_sum" else inputs
    check(getattr(torch.ops.lamamba, f"gpu_{name}_backward"), grad_y, *needed)


@interpreted
@floats
@strides
@images
@pytest.mark.parametrize("name", gpu.INFERENCE_SCHEMAS)
def test_triton_layers_without_gradients(name, tokens, weights, b, change):
    check(getattr(torch.ops.lamamba, f"gpu_{name}"), *layer_inputs(name, b, tokens, weights, change))


@interpreted
@floats
@strides
@images
def test_triton_scan(tokens, weights, b, change):
    check_scan("triton", b, tokens, weights, change)


@interpreted
def test_an_empty_batch_is_one_segment_on_a_gpu():
    from lamamba.ops.selective_scan import triton_kernels

    with FakeTensorMode():
        assert triton_kernels._choose_segments(torch.empty(0, 64, 32, device="cuda"), 4, 8) == 1


