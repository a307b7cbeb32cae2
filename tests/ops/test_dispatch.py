"""Choice of the back end: argument, context manager, environment, automatic, in this order; never replaced silently."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamamba.ops import dispatch, selective_scan, use_backend
from lamamba.ops.dispatch import Backend, Op
from lamamba.ops.selective_scan import OP
from tests.ops.test_selective_scan import make_inputs

CPU_NAMES = ["torch", "reference"]


@pytest.fixture(autouse=True)
def _no_requested_backend(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch._log_once.cache_clear()


def test_argument_goes_before_context_before_environment(monkeypatch):
    x = torch.zeros(1, 1, 1)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert OP.choose(x, 1) == "reference"
    with use_backend("torch"):
        assert OP.choose(x, 1) == "torch"
        assert OP.choose(x, 1, "reference") == "reference"
        with use_backend("auto"):
            assert OP.choose(x, 1) == OP.choose(x, 1, "auto")
    assert OP.choose(x, 1) == "reference"


def test_an_unknown_back_end_raises_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        selective_scan(**make_inputs(), backend="troch")


def test_the_automatic_choice_skips_what_is_not_installed_and_logs_it_once(caplog):
    op = Op("an_op", (Backend("fast", "no_such_package_anywhere"), *OP.backends))
    with caplog.at_level(logging.DEBUG, logger="lamamba.ops"):
        names = {op.choose(torch.zeros(1, 1, 1), 1) for _ in range(3)}
    assert len(names) == 1
    assert len(caplog.records) == 1
    assert "fast: no_such_package_anywhere is not installed" in caplog.records[0].message


def test_a_requested_back_end_that_cannot_run_raises_with_the_reason():
    op = Op("an_op", (Backend("fast", "no_such_package_anywhere"), *OP.backends))
    with pytest.raises(RuntimeError, match="'fast' .argument. cannot run here: no_such_package_anywhere is"):
        op.choose(torch.zeros(1, 1, 1), 1, "fast")


def test_a_back_end_with_a_bug_is_not_skipped(tmp_path, monkeypatch):
    (tmp_path / "a_broken_backend.py").write_text("raise ImportError('a bug')")
    monkeypatch.syspath_prepend(tmp_path)
    op = Op("an_op", (Backend("broken", "a_broken_backend"), *OP.backends))
    with pytest.raises(ImportError, match="a bug"):
        op.choose(torch.zeros(1, 1, 1), 1)


def test_shapes_that_do_not_fit_are_named():
    inputs = make_inputs(c=8)
    inputs["D"] = inputs["D"][:, :5]
    with pytest.raises(ValueError, match=r"D has shape \(4, 5\) where .* need \(4, 8\)"):
        selective_scan(**inputs)
    inputs = make_inputs()
    empty = {name: inputs[name][:, :0] for name in ("x", "dt", "B", "C", "paths")}
    with pytest.raises(ValueError, match="no tokens"):
        selective_scan(**{**inputs, **empty})


@pytest.mark.parametrize(("name", "change", "message"), [
    ("paths", torch.Tensor.int, "paths is torch.int32 on cpu; it holds numbers of tokens, torch.int64 on cpu"),
    ("paths", lambda paths: paths.to("meta"), "paths is torch.int64 on meta; .* torch.int64 on cpu as x"),
    ("x", torch.Tensor.long, "x is torch.int64; it holds real numbers"),
    ("A", lambda A: A.to(torch.complex64), "A is torch.complex64; it holds real numbers"),
    ("W_dt", torch.Tensor.sum, r"and W_dt \(\); they are \(b, l, c\), \(g, c, n\) and \(g, c, r\)"),
])
def test_what_no_scan_takes_is_named(name, change, message):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, name: change(inputs[name])})


@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_tokens_outside_the_grid_are_an_error(name):
    inputs = make_inputs()
    if reason := OP.get(name).unsupported_reason("cpu", torch.float32, 1):
        pytest.skip(reason)
    inputs["paths"] = inputs["paths"] + 10**6
    with pytest.raises((ValueError, IndexError)):
        selective_scan(**inputs, backend=name)


def test_the_operator_runs_on_the_meta_device_and_counts_its_operations():
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs(b=2, height=3, width=5, c=7, n=4, r=3).items()}
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**inputs)
    assert y.shape == (2, 15, 7)
    assert counter.get_total_flops() == 2 * (2 * 15 * 4 * 7 * 3) + 2 * 15 * 4 * 7 * (9 * 4 + 1)


@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_compiles_into_one_graph_with_the_requested_back_end(name):
    if reason := OP.get(name).unsupported_reason("cpu", torch.float32, 1):
        pytest.skip(reason)
    inputs = make_inputs()
    graphs = []

    def compiler(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda **named: selective_scan(**named), fullgraph=True, backend=compiler)
    with use_backend(name):
        torch.testing.assert_close(compiled(**inputs), selective_scan(**inputs))
    assert len(graphs) == 1
    assert name in [argument for node in graphs[0].graph.nodes for argument in node.args]
    with use_backend("reference"):
        compiled(**inputs)                                                      # recompiled
    assert "reference" in [argument for node in graphs[-1].graph.nodes for argument in node.args]
