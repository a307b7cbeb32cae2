"""Kernels that a GPU launches for a block without gradients, counted by benchmarks/gpu_launches.py."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from lamamba import UNetConfig
from lamamba.ops.layers import gpu

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing")

MOST = 17
"""Of a block while sampling, without GELU where it is not in the product before it."""


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "gpu_launches.py"
    spec = importlib.util.spec_from_file_location("gpu_launches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "changes"), [
    (torch.bfloat16, {}), (torch.float32, {}), (torch.bfloat16, {"state_size": 16})])
def test_a_block_launches_few_kernels(script, dtype, changes):
    config = UNetConfig.preset("s", image_size=256, **changes)
    model = script.meta_network(config, dtype)
    for stage, shifted in ((0, False), (0, True), (1, False), (2, True)):
        launches = script.count_block(model, 64, stage, shifted)
        width = model.architecture.stage_width(stage)
        assert launches["aten.gelu"] == (dtype == torch.float32 or width > gpu.MOST_GELU_DEPTH)
        assert launches.total() - launches["aten.gelu"] <= MOST


def test_every_kind_of_kernel_is_counted_once(script):
    launches = script.count_block(script.meta_network(UNetConfig.preset("s", image_size=256), torch.bfloat16), 64)
    expected = {"_norm": 2, "_sum_norm": 2, "_convolve": 1, "_scan": 1, "_merge": 0, "_attend": 1,
                "_linear_gelu": 1}
    assert {name: launches[f"triton.{name}"] for name in expected} == expected
    assert launches["aten.mm"] + launches["aten.addmm"] == 6                    # in, W_x, out; qkv, out; out


def test_activations_held_at_once_grow_with_the_batch(script):
    model = script.meta_network(UNetConfig.preset("s", image_size=256), torch.bfloat16)
    one, four = (script.count_network(model, images).peak for images in (1, 4))
    tokens = 32 * 32 * model.architecture.width * 2                             # of one image
    assert four == pytest.approx(4 * one, rel=0.05)
    assert 10 * tokens < one < 40 * tokens
