"""The counted operations are the ones that the paper prints, and what a loop over the formulas gives."""

from __future__ import annotations

import pytest
import torch

from lamamba.benchmarking.flops import _Counter, count, multiply_adds_by_module, on_meta, operations, saved_bytes
from lamamba.config import UNetConfig
from tests.networks import random_inputs, random_network, small_config


@pytest.mark.parametrize(("image_size", "printed"), [(256, "45.55"), (512, "181.56"), (1024, "725.59")])
def test_matrix_products_and_convolutions_of_xl(image_size, printed):
    assert f"{count(UNetConfig.preset('xl', image_size=image_size)).matrix / 1e9:.2f}" == printed


@pytest.mark.parametrize(("image_size", "printed"), [(256, "50.47"), (512, "201.21"), (1024, "804.19")])
def test_the_papers_total_with_sixteen_states(image_size, printed):
    config = UNetConfig.preset("xl", image_size=image_size, state_size=16)
    assert f"{count(config).paper_total / 1e9:.2f}" == printed


def test_blocks_that_come_again_are_counted_as_pytorch_counts_them():
    model, inputs = on_meta(small_config(depths=(3, 2, 1, 2)))
    assert operations(model, *inputs).matrix == multiply_adds_by_module(model, *inputs)[""]


def test_calls_are_alike_only_with_arguments_of_the_same_types_and_names():
    def dtypes_and_shapes():
        x = torch.ones(2, 2, dtype=torch.int64, device="meta")
        results = x + 1, x + 1.0, x + True, x.sum(0), x.sum(0, keepdim=True), torch.cat([x, x]), torch.cat([x], 0)
        return [(result.dtype, result.shape) for result in results]

    expected = dtypes_and_shapes()
    with _Counter():
        assert dtypes_and_shapes() == dtypes_and_shapes() == expected


def test_removed_branches_are_not_counted():
    full, without = (count(small_config(removed_blocks=names)) for names in ((), ("encoder.0.0.scan", "decoder.3.1")))
    assert without.parameters < full.parameters
    assert without.matrix < full.matrix
    assert without.scan < full.scan


def test_activation_memory_is_what_a_real_pass_keeps():
    config = small_config(width=64, num_heads=4, grid=16)
    real = saved_bytes(random_network(config).train(), *random_inputs(config, batch=1))
    assert count(config).activation_bytes == pytest.approx(real, rel=0.15)
