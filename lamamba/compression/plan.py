"""Plans: the set of units to remove for a budget.

    least sum of score_u   such that   sum of cost_u >= share * cost of the network         (a grouped knapsack)
    most  sum of cost_u    such that   sum of score_u <= bound

over sets where no unit is removed beside one around it. Solved exactly, as a mixed-integer linear program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from lamamba.compression.scores import Scores
from lamamba.compression.units import Removable, Unit, ancestors, canonical
from lamamba.config import check_known
from lamamba.options.base import checked, read_record
from lamamba.utils.files import attribute_differences, write_json

PLAN_VERSION = 1
SHARE_TOLERANCE = 1e-4
"""Of the shares in a plan."""
MOST_CUTS = 50
"""Sets that miss a bound by the solver's tolerance and are excluded one by one, before the bound is moved."""


@checked
@dataclass(frozen=True)
class Plan:
    """Which units to remove, and what that is expected to cost and save."""

    removed: tuple[str, ...]
    by: str
    criterion: str
    parameters: float
    """Share that is removed."""
    multiply_adds: float
    """Share that is removed."""
    time: float | None
    """Share of the measured time that is removed, where it was measured unit by unit."""
    predicted: float | None
    """Relative output loss of the set: the sum of its units' (additivity). None for other criteria."""
    predicted_with_cross_terms: float | None
    """The same, as E ||sum of differences||^2."""
    measured: float | None = None
    """Relative output loss of the set, measured on samples that no unit was scored on."""
    measured_time: float | None = None
    """Share of a forward pass's time that the pruned network really saves, timed in turns with the whole one."""
    times: dict[str, Any] | None = None
    """Seconds that go with each unit ("": of the whole pass), with device and number of images; where by is "time"."""
    version: int = PLAN_VERSION
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Teacher with its hash, data, samples, seed, times of the scores."""

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read plan.json.

        Raises:
            ValueError: when it is damaged or of a newer format.
        """
        return read_record(cls, path, PLAN_VERSION)

    def __str__(self) -> str:
        lines = [
            f"{len(self.removed)} units removed: {self.parameters:.1%} of the parameters, "
            f"{self.multiply_adds:.1%} of the multiply-adds"
            + ("" if self.time is None else f", {self.time:.1%} of the time unit by unit")
            + ("" if self.measured_time is None else f", {self.measured_time:.1%} timed together")
        ]
        losses = {
            "predicted by the sum": self.predicted, "with cross terms": self.predicted_with_cross_terms,
            "measured": self.measured,
        }
        known = [f"{what} {loss:.3g}" for what, loss in losses.items() if loss is not None]
        if known:
            lines.append("relative output loss: " + ", ".join(known))
        return "\n".join([*lines, *(f"  {name}" for name in self.removed)])


def check_plan(plan: Plan, network: Removable, where: str | Path = "the plan") -> None:
    """Check that a plan is of a network: its units, each once, and the shares that go with them.

    Raises:
        ValueError: when it is of another network, or was edited.
    """
    try:
        names = network.canonical(plan.removed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if names != tuple(sorted(plan.removed)):
        extra = sorted(plan.removed)
        for name in names:
            extra.remove(name)
        raise ValueError(f"{where}: {', '.join(extra)} is removed twice, or goes with a unit around it; leave it out")
    parameters, multiply_adds = network.cost(names)
    for name, value, whole in (("parameters", parameters, network.parameters),
                               ("multiply_adds", multiply_adds, network.multiply_adds)):
        if abs(getattr(plan, name) - value / whole) > SHARE_TOLERANCE:
            raise ValueError(
                f"{where}: {name}={getattr(plan, name):g}, and without its units {value / whole:.4f} are removed; plan "
                "again"
            )


def check_scored(scores: Scores, network: Removable) -> None:
    """Check that scores are of a network's units, as they are.

    Raises:
        ValueError: naming the first that differs.
    """
    if len(scores.units) != len(network.units):
        raise ValueError(f"the scores are of {len(scores.units)} units, the network has {len(network.units)}")
    for there, here in zip(scores.units, network.units, strict=True):
        if there != here:
            found = attribute_differences(there, here, [field.name for field in dataclasses.fields(Unit)])
            raise ValueError(f"the scores are not of this network: unit {here.name} has {'; '.join(found)}")


def make_plan(
    scores: Scores, *, remove: float | None = None, max_loss: float | None = None, by: str = "parameters",
    keep: Iterable[str] = (), times: Mapping[str, float] | None = None, allowed: Iterable[str] | None = None,
) -> Plan:
    """The best set of units to remove.

    Args:
        scores: of the units.
        remove: share of the network's cost to remove at least, 0 .. 1: the plan has the least predicted loss.
        max_loss: the bound of the predicted relative loss: the plan removes the most. Instead of `remove`.
        by: what cost means.
        keep: units that stay, and with them those around them; a stage's name for all of its units.
        times: seconds saved without each unit, and "" of the whole network; for by="time".
        allowed: the only units that may go; by default all.

    Raises:
        ValueError: when the share cannot be reached (with the largest that can), a unit is unknown, or times lack.
    """
    if (remove is None) == (max_loss is None):
        raise ValueError("give either the share to remove or the largest loss (remove, max_loss), one of them")
    if max_loss is not None and scores.criterion != "output":
        raise ValueError(f"max_loss needs scores of criterion 'output'; those of {scores.criterion!r} are no loss")
    costs, whole = _costs(scores, by, times)
    free = _free(scores.units, keep, allowed) & np.isfinite(scores.values)
    if remove is not None:
        chosen = _least_loss(scores, costs, remove, free, whole)
    else:
        chosen = _most_removed(scores, costs, float(max_loss or 0) * scores.energy, free)
    return describe(scores, chosen, by=by, times=times)


def check_share(network: Removable, remove: float, by: str = "parameters", keep: Iterable[str] = ()) -> None:
    """Raise what `make_plan` would raise for a share of parameters or multiply-adds, before anything is scored.

    Raises:
        ValueError: when the share cannot be reached (with the largest that can), or a unit is unknown.
    """
    free = _free(network.units, keep, None)
    if by != "time":
        costs, whole = _costs(network, by, None)
        _most(network.units, costs, remove, free, whole)


def describe(
    scores: Scores, names: Iterable[str], *, by: str = "parameters", times: Mapping[str, float] | None = None
) -> Plan:
    """What removing a set of units saves and is predicted to cost."""
    names = canonical(scores.units, names)
    chosen = [scores.units[number] for number in scores.index(names)]
    with_cross_terms, is_output = scores.predicted_with_cross_terms(names), scores.criterion == "output"
    return Plan(
        names, by, scores.criterion, sum(unit.parameters for unit in chosen) / scores.parameters,
        sum(unit.multiply_adds for unit in chosen) / scores.multiply_adds,
        None if times is None else sum(times[name] for name in names) / times[""],
        scores.predicted(names) / scores.energy if is_output else None,
        None if with_cross_terms is None else with_cross_terms / scores.energy, about=dict(scores.about),
    )


def _costs(scores: Scores | Removable, by: str, times: Mapping[str, float] | None) -> tuple[np.ndarray, float]:
    check_known("by", by, ("parameters", "multiply-adds", "time"))
    if by == "time":
        if times is None:
            raise ValueError("by='time' needs the measured time of every unit (times)")
        return np.array([max(0.0, times[unit.name]) for unit in scores.units]), times[""]
    attribute = by.replace("-", "_")
    costs = np.array([getattr(unit, attribute) for unit in scores.units], float)
    return costs, float(getattr(scores, attribute))


def _free(units: Sequence[Unit], keep: Iterable[str], allowed: Iterable[str] | None) -> np.ndarray:
    """(u,) whether each unit may be removed."""
    known = {unit.name: unit for unit in units}
    groups = {unit.group: [each.name for each in units if each.group == unit.group] for unit in units}
    kept = {unit for name in keep for unit in ([name] if name in known else groups.get(name, [name]))}
    may = set(known if allowed is None else allowed)
    for name in sorted(kept | may):
        check_known("unit", name, known)
    around = {other for name in kept for other in ancestors(known, name)}
    inside = {name for name in known if kept & set(ancestors(known, name))}
    return np.array([unit.name in may and unit.name not in kept | around | inside for unit in units])


def _structure(units: Sequence[Unit]) -> LinearConstraint:
    """A unit goes alone or within one around it; where a unit is the sum of those inside it, it is chosen for them."""
    rows: list[tuple[dict[int, float], float]] = []
    order = {unit.name: number for number, unit in enumerate(units)}
    known = {unit.name: unit for unit in units}
    for number, unit in enumerate(units):
        rows += [({number: 1.0, order[around]: 1.0}, 1.0) for around in ancestors(known, unit.name)]
        inside = [order[other.name] for other in units if other.parent == unit.name]
        if unit.is_sum and inside:
            rows.append((dict.fromkeys(inside, 1.0), len(inside) - 1.0))
    matrix = lil_matrix((max(1, len(rows)), len(units)))
    for row, (entries, _) in enumerate(rows):
        for column, value in entries.items():
            matrix[row, column] = value
    return LinearConstraint(matrix.tocsr(), -np.inf, np.array([bound for _, bound in rows] or [0.0]))


def _solve(
    objective: np.ndarray, units: Sequence[Unit], free: np.ndarray, row: np.ndarray, low: float, high: float,
    excluded: Sequence[Sequence[str]] = (),
) -> list[str] | None:
    """Minimise objective x over the sets of units with low <= row x <= high, but for some; None where there is none.

    The solver keeps the bounds to 1e-6: who needs them exactly excludes the sets that miss them, and solves again.
    """
    scale = np.abs(objective).max() or 1.0
    cuts = [
        LinearConstraint(np.array([[1.0 if unit.name in names else -1.0 for unit in units]]), -np.inf, len(names) - 1)
        for names in excluded
    ]
    found = milp(
        objective / scale * 1e6, integrality=np.ones(len(units)), bounds=Bounds(0, free.astype(float)),
        constraints=[_structure(units), LinearConstraint(row[None], low, high), *cuts], options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    return [unit.name for unit, value in zip(units, found.x, strict=True) if value > 0.5]


def _most(units: Sequence[Unit], costs: np.ndarray, remove: float, free: np.ndarray, whole: float) -> list[str]:
    """The set that costs the most, when that is the share at least."""
    if not 0 <= remove <= 1:
        raise ValueError(f"remove={remove:g} must be a share, 0 to 1: 0.5 removes half")
    most = set(_solve(-costs, units, free, costs / whole, 0, np.inf) or ())
    reached = sum(cost for unit, cost in zip(units, costs, strict=True) if unit.name in most) / whole
    if remove > reached:
        raise ValueError(f"{remove:.1%} cannot be removed: without every unit that may go, {reached:.1%} are removed")
    return sorted(most)


def _least_loss(scores: Scores, costs: np.ndarray, remove: float, free: np.ndarray, whole: float) -> list[str]:
    most, wanted, share = _most(scores.units, costs, remove, free, whole), remove * whole, remove
    values = np.maximum(np.where(free, scores.values, 0.0), 0.0)                # of "task": a gain is no reason
    missed: list[list[str]] = []
    while True:
        chosen = _solve(values, scores.units, free, costs / whole, share, np.inf, missed)
        if chosen is None:                                                      # beyond the most that can go
            return most
        if costs[scores.index(chosen)].sum() >= wanted:
            return chosen
        missed.append(chosen)
        if len(missed) > MOST_CUTS:                                             # many sets within the tolerance
            missed, share = [], share + 2e-6


def _most_removed(scores: Scores, costs: np.ndarray, bound: float, free: np.ndarray) -> list[str]:
    values = np.where(free, np.maximum(scores.values, 0.0), 0.0)
    scale, limit, missed = max(bound, 1e-30), 1.0, list[list[str]]()
    while True:
        chosen = _solve(-costs, scores.units, free, values / scale, -np.inf, limit, missed) or []
        if scores.predicted(chosen) <= bound or not chosen:
            return chosen
        missed.append(chosen)
        if len(missed) > MOST_CUTS:
            missed, limit = [], limit - 2e-6


def in_order(
    scores: Scores, remove: float, by: str = "parameters", keep: Iterable[str] = (),
    times: Mapping[str, float] | None = None,
) -> Plan:
    """Remove units from the lowest score to the highest until a share is reached: how "hand" and "random" remove.

    Args: as of `make_plan`.

    Raises:
        ValueError: when the share cannot be reached.
    """
    costs, whole = _costs(scores, by, times)
    free, chosen = _free(scores.units, keep, None) & np.isfinite(scores.values), []
    for number in np.argsort(scores.values, kind="stable"):
        if free[number]:
            chosen.append(scores.units[number].name)
            if costs[scores.index(chosen)].sum() >= remove * whole:
                return describe(scores, chosen, by=by, times=times)
    reached = costs[scores.index(chosen)].sum() / whole if chosen else 0.0
    raise ValueError(f"{remove:.1%} cannot be removed in this order: {reached:.1%} are, without every unit that may go")
