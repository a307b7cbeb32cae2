"""Conditioning that is made ahead changes nothing but the work."""

from __future__ import annotations

import pytest
import torch

from lamamba.inference.conditioning import ConditionedNetwork
from tests.networks import random_inputs, random_network, small_config


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"removed_blocks": ("encoder.0.0.scan", "bottleneck")}])
def test_a_network_starts_from_conditioning_made_before(changes):
    model = random_network(small_config(**changes))
    x, t, labels = random_inputs(model.architecture, batch=3)
    with torch.no_grad():
        conditioning = model.condition(t, labels)
        assert conditioning.shape == (3, model.condition_outputs)
        torch.testing.assert_close(model(x, None, conditioning=conditioning), model(x, t, labels))


def test_conditioning_that_does_not_fit_is_refused():
    model = random_network(small_config())
    x, t, labels = random_inputs(model.architecture, batch=3)
    with torch.no_grad():
        rows = model.condition(t, labels)
        with pytest.raises(ValueError, match=r"conditioning has shape \(2, .*a row for each image"):
            model(x, None, conditioning=rows[:2])
        with pytest.raises(ValueError, match="timestep is None"):
            model(x, None, labels)
        with pytest.raises(ValueError, match="class_labels run from 0 to 4"):
            model.condition(500.0, torch.tensor([0, 4]))
        with pytest.raises(ValueError, match="this network is conditional"):
            model.condition(500.0)


@pytest.mark.parametrize(("rows_bytes", "calls"), [(1 << 30, 1), (0, 4)])
def test_a_run_makes_its_conditioning_once_for_each_time_and_label(monkeypatch, rows_bytes, calls):
    model = random_network(small_config())
    made, condition = [], model.condition
    monkeypatch.setattr(model, "condition", lambda t, y: made.append(t) or condition(t, y))
    x, _, _ = random_inputs(model.architecture, batch=5)
    labels = torch.tensor([2, 0, 2, 3, 3])
    times = [900.0, 600.0, 600.0, 300.5, 0.0]                                   # one comes twice, as in Heun's method
    network = ConditionedNetwork(model, times, labels.tolist(), rows_bytes)
    with torch.no_grad():
        for time in times:
            t = torch.tensor(time).expand(5)
            torch.testing.assert_close(network(x, t, labels), model(x, t, labels))
    assert len(made) == calls
    assert sum(len(t) for t in made) == 4 * 3


def test_a_time_that_nobody_announced_is_made_when_it_comes():
    model = random_network(small_config(num_classes=0))
    x, _, _ = random_inputs(model.architecture)
    network = ConditionedNetwork(model, [900.0, 0.0], None)
    with torch.no_grad():
        for time in (900.0, 451.25):
            t = torch.full((2,), time)
            torch.testing.assert_close(network(x, t, None), model(x, t))


def test_both_halves_compile_into_one_graph():
    model = random_network(small_config(removed_blocks=("bottleneck", "encoder.1.0", "encoder.2.0", "encoder.3.0")))
    x, t, labels = random_inputs(model.architecture)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    condition = torch.compile(model.condition, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(x, t, labels)
        torch.testing.assert_close(compiled(x, None, conditioning=condition(t, labels)), expected)
