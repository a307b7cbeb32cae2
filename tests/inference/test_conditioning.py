"""Conditioning that is made ahead changes nothing but the work."""

from __future__ import annotations

import pytest
import torch

from lamamba.inference import conditioning
from lamamba.inference.conditioning import ConditionedNetwork
from lamamba.sampling.generate import ImageGenerator, generate
from tests.networks import largest_difference, random_inputs, random_network, small_config, two_blocks


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
    model = random_network(two_blocks())
    x, t, labels = random_inputs(model.architecture)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    condition = torch.compile(model.condition, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(x, t, labels)
        torch.testing.assert_close(compiled(x, None, conditioning=condition(t, labels)), expected)


def count_rows(monkeypatch, model):
    """Calls of model.condition, as numbers of rows."""
    rows, condition = [], model.condition
    monkeypatch.setattr(model, "condition", lambda t, y: rows.append(len(t)) or condition(t, y))
    return rows


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_one_object_serves_many_batches(monkeypatch, guidance):
    model = random_network(small_config(in_channels=1, objective="flow", width=8))
    rows = count_rows(monkeypatch, model)
    labels = [k % 3 for k in range(12)]
    images = generate(model, labels, range(12), num_steps=4, guidance=guidance, batch_size=2)
    assert rows == [4 * (3 + (guidance != 1))]
    generator = ImageGenerator(model, num_steps=4, guidance=guidance, batch_size=2, labels=range(3))
    again = [generator(labels[k : k + 3], range(k, k + 3)) for k in (6, 0, 9, 3)]           # in any order of the calls
    assert len(rows) == 2
    for first, part in zip((6, 0, 9, 3), again, strict=True):
        assert largest_difference(part, images[first : first + 3]) <= 1


def test_many_classes_in_many_steps_take_bounded_memory(monkeypatch):
    model = random_network(small_config(in_channels=1, objective="flow", width=8, num_classes=50))
    row_bytes = 4 * model.condition_outputs
    monkeypatch.setattr(conditioning, "ROWS_BYTES", 20 * row_bytes)
    rows = count_rows(monkeypatch, model)
    generate(model, range(50), range(50), num_steps=4, guidance=2.0, batch_size=4)
    assert max(rows) <= 20
    assert sum(rows) == 12 * 4 * 5 + 4 * 3                                      # each batch's own labels and no class


def test_rows_do_not_depend_on_what_was_sampled_before(monkeypatch):
    """So that a shard of images is the same bytes whichever process makes it, and after which others."""
    model = random_network(small_config(in_channels=1, objective="flow", width=8, num_classes=50))
    monkeypatch.setattr(conditioning, "ROWS_BYTES", 0)
    rows = count_rows(monkeypatch, model)
    generator = ImageGenerator(model, num_steps=2, guidance=2.0, labels=range(50))
    generator([4, 7, 9], [0, 1, 2])
    before = len(rows)
    part = generator([7, 4], [5, 6])
    assert rows[before:] == [3, 3]                                              # not those of the three labels before
    fresh = ImageGenerator(model, num_steps=2, guidance=2.0, labels=range(50))
    assert (fresh([7, 4], [5, 6]) == part).all()
