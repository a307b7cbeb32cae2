"""Plans equal brute force; what cannot be met is refused with what can."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamamba.compression.plan import Plan, describe, in_order, make_plan
from lamamba.compression.scores import TIME_BINS, Scores
from lamamba.compression.units import Unit, ancestors, canonical


def units_of(costs):
    """A bottleneck with a block of two branches inside, and another block of two branches."""
    names = ["bottleneck", "bottleneck.0", "bottleneck.0.scan", "bottleneck.0.mlp", "e.0", "e.0.scan", "e.0.mlp"]
    a, b, c, d, extra, more = costs
    parameters = [a + b + extra, a + b + extra, a, b, c + d + more, c, d]
    parents = [None, "bottleneck", "bottleneck.0", "bottleneck.0", None, "e.0", "e.0"]
    return tuple(
        Unit(name, name.split(".")[-1], "g", parent, size, 2 * size, is_sum=name in ("bottleneck.0", "e.0"))
        for name, parent, size in zip(names, parents, parameters, strict=True)
    )


def scores_of(costs, values, products=None):
    units = units_of(costs)
    n = len(units)
    whole = units[0].parameters + units[4].parameters + 10
    return Scores(
        "output", units, np.array(values, float), np.zeros(n), np.full((n, TIME_BINS), np.nan), products, 2.0, whole,
        2 * whole, {"teacher": "t"},
    )


def all_sets(units):
    """Every set that a plan may hold: none beside a unit around it, none that is all of a sum."""
    known, names = {unit.name: unit for unit in units}, [unit.name for unit in units]
    for size in range(len(names) + 1):
        for chosen in itertools.combinations(names, size):
            nested = any(set(ancestors(known, name)) & set(chosen) for name in chosen)
            if not nested and set(canonical(units, chosen)) == set(chosen):
                yield chosen


COSTS = st.tuples(*[st.integers(1, 50)] * 4, st.integers(0, 20), st.integers(0, 20))
VALUES = st.lists(st.floats(1e-6, 10), min_size=7, max_size=7)


@settings(max_examples=40, deadline=None)
@given(COSTS, VALUES, st.floats(0.01, 0.99), st.lists(st.integers(0, 6), max_size=2))
def test_the_least_loss_for_a_share_is_that_of_brute_force(costs, values, share, kept):
    scores = scores_of(costs, values)
    keep = [scores.units[number].name for number in kept]
    known = {unit.name: unit for unit in scores.units}
    related = {name for name in known if any(
        name == other or name in ancestors(known, other) or other in ancestors(known, name) for other in keep
    )}
    fitting = [
        chosen for chosen in all_sets(scores.units)
        if not set(chosen) & related and describe(scores, chosen).parameters >= share
    ]
    if not fitting:
        with pytest.raises(ValueError, match="cannot be removed"):
            make_plan(scores, remove=share, keep=keep)
        return
    plan = make_plan(scores, remove=share, keep=keep)
    assert plan.parameters >= share
    assert scores.predicted(plan.removed) == pytest.approx(min(map(scores.predicted, fitting)), rel=1e-6)


@settings(max_examples=40, deadline=None)
@example((1, 1, 1, 1, 0, 0), [1.0] * 6 + [1e-6], 1.0)                           # missed by 1e-6
@given(COSTS, VALUES, st.floats(0, 20))
def test_the_most_removed_for_a_loss_is_that_of_brute_force(costs, values, bound):
    scores = scores_of(costs, values)
    plan = make_plan(scores, max_loss=bound / scores.energy, by="multiply-adds")
    fitting = [chosen for chosen in all_sets(scores.units) if scores.predicted(chosen) <= bound]
    assert plan.predicted <= bound / scores.energy
    assert plan.multiply_adds == pytest.approx(max(describe(scores, chosen).multiply_adds for chosen in fitting))


def test_cross_terms_are_the_square_of_the_sum_of_differences():
    differences = np.random.default_rng(0).standard_normal((7, 12))
    scores = scores_of((1, 2, 3, 4, 5, 6), (differences**2).mean(1), differences @ differences.T / 12)
    plan = describe(scores, ["bottleneck.0.scan", "e.0"])
    together = differences[2] + differences[4]
    assert plan.predicted_with_cross_terms == pytest.approx((together**2).mean() / 2)
    assert plan.predicted == pytest.approx(((differences[[2, 4]] ** 2).mean(1)).sum() / 2)


def test_a_plan_by_time_takes_the_seconds_that_were_measured():
    scores = scores_of((10, 10, 10, 10, 0, 0), [1] * 7)
    seconds = {unit.name: 0.0 for unit in scores.units} | {"": 1.0, "e.0.mlp": 0.4}
    assert make_plan(scores, remove=0.3, by="time", times=seconds).removed == ("e.0.mlp",)


def test_in_order_removes_the_lowest_first():
    scores = scores_of((10, 10, 10, 10, 0, 0), [7, 6, 5, 4, 3, 2, 1])
    assert in_order(scores, 0.2).removed == ("e.0.mlp",)
    assert in_order(scores, 0.3).removed == ("e.0",)
    with pytest.raises(ValueError, match="80.0% are"):
        in_order(scores, 0.9)


@pytest.mark.parametrize(("changes", "message"), [
    ({"remove": 0.9}, r"90.0% cannot be removed: .* 80.0% are removed"),
    ({"remove": 0.5, "keep": ["e.0.skan"]}, "did you mean 'e.0.scan'"),
    ({"remove": 0.5, "by": "params"}, "did you mean 'parameters'"),
    ({"remove": 0.5, "by": "time"}, "needs the measured time"),
    ({"remove": 1.5}, "must be a share"),
    ({}, "give either the share"),
])
def test_budgets_that_cannot_be_met_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(scores_of((10, 10, 10, 10, 0, 0), [1] * 7), **changes)


def test_plans_and_scores_are_read_as_they_were_written(tmp_path):
    scores = scores_of((1, 2, 3, 4, 5, 6), range(7), np.diag(np.arange(7.0)))
    scores.save(tmp_path / "scores.json")
    again = Scores.load(tmp_path / "scores.json")
    assert again.to_json() == scores.to_json()
    plan = dataclasses.replace(make_plan(scores, remove=0.3), measured=0.25)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 99}', '{"version": 1, "removed": 5}'])
@pytest.mark.parametrize("kind", [Scores, Plan])
def test_damaged_files_are_named(tmp_path, text, kind):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"file\.json"):
        kind.load(path)
