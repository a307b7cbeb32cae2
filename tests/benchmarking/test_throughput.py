"""Networks are timed in turns, each with a peak memory of its own; failures have their reason."""

from __future__ import annotations

import pytest
import torch

from lamamba.benchmarking import throughput
from lamamba.benchmarking.throughput import Case, build, inputs, measure, ratios
from lamamba.benchmarking.turns import leave_out, merge, sets_in_turns
from lamamba.inference.packing import PackedLinear, can_pack, pack_weights


def pair(**changes) -> list[Case]:
    options = {"image_size": 32, "batch": 2, "dtype": "float32", "device": "cpu", "mode": "forward", "threads": 1}
    return [Case(name, **{**options, **changes}) for name in ("s", "dit-s-2")]


@pytest.mark.slow
def test_two_networks_take_turns():
    said = []
    ours, theirs = measure(pair(), seconds=0, on_progress=said.append)
    assert (ours["model"], theirs["model"]) == ("s", "dit-s-2")
    for row in (ours, theirs):
        low, high = row["ms_quartiles"]
        assert 0 < low <= row["ms"] <= high
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
        assert row["passes"] >= throughput.MIN_PASSES
        assert row["in_memory_together"]
        assert 1 <= row["peak_memory_bytes"] / (4 * row["parameters"]) < 3
        rate = 2 * row["multiply_adds"] / (row["ms"] / 1000)
        assert row["multiply_adds_per_second"] == pytest.approx(rate)
        assert row["share_of_product"] == pytest.approx(rate / row["product_multiply_adds_per_second"])
    assert ours["product_multiply_adds_per_second"] == theirs["product_multiply_adds_per_second"] > 1e9
    turns = [text.split()[0] for text in said if "passes" in text]
    assert turns[:2] == ["s", "dit-s-2"]
    (ratio,) = ratios([ours, theirs])
    assert ratio["ratio"] == ours["images_per_second"] / theirs["images_per_second"]
    assert (ratio["model"], ratio["peer"], ratio["batch"]) == ("s", "dit-s-2", 2)


@pytest.mark.slow
def test_networks_that_do_not_fit_are_loaded_one_after_the_other(monkeypatch):
    monkeypatch.setattr(throughput, "free_memory", lambda device: 2**27)
    (row,) = measure(pair(mode="train")[:1], seconds=0)
    assert not row["in_memory_together"]
    assert row["passes"] >= 2 * throughput.MIN_PASSES
    assert row["peak_memory_bytes"] > 15 * row["parameters"]                    # weights, gradients, two moments


def test_failures_have_their_reason(monkeypatch):
    monkeypatch.setenv("LAMAMBA_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="s, 32 px, batch 2, forward: RuntimeError: .* back end 'triton'"):
        measure(pair()[:1], seconds=0)


def test_memory_estimates_are_upper_bounds():
    small, large = (sum(case.memory_estimate() for case in pair(image_size=size)) for size in (64, 256))
    assert 4 * 59e6 < small < large
    assert sum(case.memory_estimate() for case in pair(mode="train")) > 16 * 59e6


@pytest.mark.parametrize("index", [0, 1])
def test_an_untrained_network_has_an_output_that_is_not_zero(index):
    case = pair(dtype="bfloat16")[index]
    model = build(case).eval()
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    with torch.no_grad():
        plain = model(*inputs(case, torch.device("cpu")))
        assert plain.float().std() > 0.01
        pack_weights(model, 32)
        packed = model(*inputs(case, torch.device("cpu")))
        assert (packed - plain).abs().max() <= 0.05 * plain.abs().max()
        assert any(isinstance(module, PackedLinear) for module in model.modules()) == can_pack(torch.bfloat16)


def test_rows_that_differ_in_anything_have_no_ratio():
    row = {"image_size": 256, "batch": 1, "dtype": "float32", "device": "cpu", "mode": "forward"}
    ours, theirs = {**row, "model": "xl", "images_per_second": 3}, {**row, "model": "dit-xl-2", "images_per_second": 2}
    assert [ratio["ratio"] for ratio in ratios([ours, theirs])] == [1.5]
    assert ratios([ours, {**theirs, "batch": 2}]) == []
    assert ratios([{**ours, "set": 1}, {**theirs, "set": 2}]) == []


def cases(*names: str) -> list[Case]:
    return [Case(name, 256, 1, "float32", "cpu", "forward") for name in names]


def test_the_multiply_adds_of_a_training_step_are_three_forward_passes():
    forward, step = (Case("dit-s-2", 256, 4, "float32", "cpu", mode) for mode in ("forward", "train"))
    assert forward.multiply_adds == 4 * forward.cost.matrix
    assert step.multiply_adds == 3 * forward.multiply_adds
    assert step.product().multiply_adds == 3072**3
    assert (step.product().mode, step.product().batch) == ("forward", 1)


def test_networks_that_fit_together_take_turns_and_else_each_peer_with_ours(monkeypatch):
    present = cases("s", "b", "dit-s-2", "dit-s-4")
    assert list(sets_in_turns(present, "auto")) == [present]
    free = 1.2 * sum(case.memory_estimate() for case in present)                # too little with the large product
    monkeypatch.setattr(throughput, "free_memory", lambda device: free)
    ours, first, second = present[:2], present[2], present[3]
    assert list(sets_in_turns(present, "auto")) == [[*ours, first], [*ours, second]]
    large = cases("dit-xl-2", "dim-huge")
    assert list(sets_in_turns([*present, *large], "auto")) == [[*ours, first], [*ours, second], [*ours, *large]]
    assert list(sets_in_turns(present, "apart")) == [present]
    assert list(sets_in_turns(present[:3], "auto")) == [present[:3]]


def test_what_does_not_fit_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(throughput, "free_memory", lambda device: 2**31)
    fitting, others = leave_out(cases("s", "dit-s-2", "dit-xl-2"))
    assert [case.model for case in fitting] == ["s", "dit-s-2"]
    assert others[0].items() >= {"model": "dit-xl-2", "image_size": 256}.items()
    assert others[0]["reason"].startswith("needs about ")
    with pytest.raises(RuntimeError, match="xl: too large for the free memory of cpu"):
        leave_out(cases("xl", "dit-s-2"))


def test_rows_of_several_sets_become_one_of_medians():
    row = {"model": "xl", "image_size": 256, "batch": 1, "is_peer": False, "passes": 3, "ms_fastest": 1.0,
           "images_per_second": 1.0, "multiply_adds_per_second": 1.0, "product_multiply_adds_per_second": 1.0,
           "share_of_product": 0.5, "ms_quartiles": [1.0, 3.0], "peak_memory_bytes": 5, "ms": 2.0, "set": 1}
    again = {**row, "ms": 4.0, "ms_quartiles": [2.0, 5.0], "peak_memory_bytes": 7, "share_of_product": 0.7, "set": 2}
    peer = {**row, "model": "ldm-4", "is_peer": True}
    first, second = merge([peer, row, again])
    assert (first["ms"], first["ms_quartiles"], first["passes"], first["peak_memory_bytes"]) == (3.0, [1.5, 4.0], 6, 7)
    assert first["share_of_product"] == pytest.approx(0.6)
    assert second == peer
