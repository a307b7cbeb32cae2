"""Pictures of scores, plans, additivity and criteria, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from lamamba.compression.additivity import SetLoss, rank_correlation
from lamamba.compression.scores import Scores
from lamamba.compression.units import ancestors
from lamamba.viz.curves import save_figure, set_log, tidy

COLORS = {"output": "#1f6fb4", "task": "#b4641f", "magnitude": "#2f8f5b", "hand": "#8a4fa3", "random": "#777777"}
"""Of the criteria."""


def draw_units(scores: Scores, path: Path, removed: Iterable[str] = ()) -> None:
    """The network as a table: blocks in order, a row for each kind; colours are scores, removed units are crossed out.

    Args:
        scores: of any criterion; units that it never removes stay white.
        path: a PNG.
        removed: units of a plan.
    """
    known, gone = {unit.name: unit for unit in scores.units}, set(removed)
    parents = {unit.parent for unit in scores.units}
    leaves = [unit for unit in scores.units if unit.name not in parents]
    kinds = list(dict.fromkeys(unit.kind for unit in leaves))
    columns = list(dict.fromkeys((unit.group, unit.parent or unit.name) for unit in leaves))
    value = dict(zip((unit.name for unit in scores.units), scores.values / scores.energy, strict=True))
    positive = [value[unit.name] for unit in leaves if 0 < value[unit.name] < math.inf] or [1.0]
    figure = Figure(figsize=(max(7.0, 0.42 * len(columns) + 2.5), 0.55 * len(kinds) + 2.2))
    axes = figure.subplots()
    grid = np.full((len(kinds), len(columns)), np.nan)
    for unit in leaves:
        row, column = kinds.index(unit.kind), columns.index((unit.group, unit.parent or unit.name))
        if math.isfinite(value[unit.name]):
            grid[row, column] = max(value[unit.name], min(positive))
        if unit.name in gone or gone & set(ancestors(known, unit.name)):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", alpha=0.75, edgecolor="none"))
            axes.plot([column - 0.3, column + 0.3], [row - 0.3, row + 0.3], color="#c0392b", linewidth=1.5)
            axes.plot([column - 0.3, column + 0.3], [row + 0.3, row - 0.3], color="#c0392b", linewidth=1.5)
    image = axes.imshow(grid, cmap="viridis", norm=LogNorm(min(positive), max(positive)), aspect="auto")
    label = "relative output loss of removing it alone" if scores.criterion == "output" else scores.criterion
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    groups = [group for group, _ in columns]
    starts = [number for number, group in enumerate(groups) if number == 0 or groups[number - 1] != group]
    ends = [*starts[1:], len(groups)]
    middles = [(first + end - 1) / 2 for first, end in zip(starts, ends, strict=True)]
    axes.set_xticks(middles, [groups[first] for first in starts], rotation=40, ha="right")
    axes.set_yticks(range(len(kinds)), kinds)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=3)
    axes.spines[:].set_visible(False)
    axes.set_title("what goes is crossed out" if gone else "scores of the units")
    save_figure(figure, path)


def draw_additivity(sets: Sequence[SetLoss], path: Path) -> None:
    """Predicted against measured losses of sets of units, by the sum of scores and with cross terms."""
    has_cross_terms = all(each.predicted_with_cross_terms is not None for each in sets)
    figure = Figure(figsize=(9 if has_cross_terms else 5, 4.4))
    panels = figure.subplots(1, 2 if has_cross_terms else 1, sharey=True, squeeze=False)[0]
    for axes, with_cross_terms in zip(panels, (False, True), strict=False):
        for kind, color in (("random", "#999999"), ("sensible", COLORS["output"])):
            points = [each for each in sets if each.kind == kind]
            predicted: list[Any] = [
                each.predicted_with_cross_terms if with_cross_terms else each.predicted for each in points
            ]
            measured = [each.measured for each in points]
            axes.plot(predicted, measured, "o", color=color, markersize=4, alpha=0.75, label=f"{kind} sets")
        xlabel = "predicted with cross terms" if with_cross_terms else "predicted by the sum of scores"
        axes.set(xscale="log", yscale="log", xlabel=xlabel)
        low, high = (bound(axes.get_xlim()[i], axes.get_ylim()[i]) for i, bound in ((0, max), (1, min)))
        axes.plot([low, high], [low, high], color="black", linewidth=0.8, label="equal")
        sensible = [each for each in sets if each.kind == "sensible"]
        if len(sensible) > 2:
            found = rank_correlation(sensible, with_cross_terms=with_cross_terms)
            axes.set_title(f"rank correlation of sensible sets {found:.3f}", fontsize=10)
    panels[0].set(ylabel="measured relative output loss")
    panels[0].legend(frameon=False)
    tidy(panels.tolist())
    save_figure(figure, path)


def draw_criteria(
    curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path, labels: Mapping[str, str] | None = None,
    whole: Mapping[str, float] | None = None,
) -> None:
    """Loss, and figures such as the distance, over the removed share for every criterion; random draws lie behind.

    Args:
        curves: points {"share": ..., "loss": ..., figure: ...} by criterion; those of "random" are single draws.
        path: a PNG.
        labels: figures to draw besides, with the label of their axis.
        whole: the figures of the whole network.
    """
    panels_of = {"loss": "relative output loss", **(labels or {})}
    figure = Figure(figsize=(4.6 * len(panels_of) + 0.6, 4.2))
    panels = figure.subplots(1, len(panels_of), squeeze=False)[0]
    for axes, (name, label) in zip(panels, panels_of.items(), strict=True):
        for criterion, points in curves.items():
            known = [point for point in points if name in point]
            shares, values = [point["share"] for point in known], [point[name] for point in known]
            if criterion == "random":
                axes.plot(shares, values, ".", color=COLORS["random"], alpha=0.6, zorder=0, label="random draws")
            else:
                axes.plot(shares, values, "o-", color=COLORS.get(criterion), markersize=4, label=criterion)
        if whole and name in whole:
            axes.axhline(whole[name], color="black", linewidth=0.8, linestyle=":", label="whole network")
        axes.set(xlabel="parameters removed", ylabel=label)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        values = [point[name] for points in curves.values() for point in points if name in point]
        if name != "accuracy" and min(values, default=0) > 0:
            set_log(axes)
    panels[0].legend(frameon=False, fontsize=8)
    tidy(panels.tolist())
    save_figure(figure, path)
