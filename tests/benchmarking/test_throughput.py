"""Networks are timed in turns, each with a peak memory of its own; failures have their reason."""

from __future__ import annotations

import pytest
import torch

from lamamba.benchmarking import throughput
from lamamba.benchmarking.throughput import Case, build, inputs, measure, ratios
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
        assert any(isinstance(module, PackedLinear) for module in model.modules()) == can_pack()


def test_rows_that_differ_in_anything_have_no_ratio():
    row = {"image_size": 256, "batch": 1, "dtype": "float32", "device": "cpu", "mode": "forward"}
    ours, theirs = {**row, "model": "xl", "images_per_second": 3}, {**row, "model": "dit-xl-2", "images_per_second": 2}
    assert [ratio["ratio"] for ratio in ratios([ours, theirs])] == [1.5]
    assert ratios([ours, {**theirs, "batch": 2}]) == []
