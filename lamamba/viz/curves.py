"""Curves of trainings, evaluations and benchmarks as PNG files.

Figures are made without pyplot: nothing here changes the backend or the open figures of a notebook.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter
from matplotlib.transforms import Bbox

from lamamba.config import LATENT_SCALE
from lamamba.utils.files import parse_json, read_text, replacing
from lamamba.utils.text import shown

DISTILLATION = {
    "task_loss": "task", "output_loss": "distance to the teacher's output",
    "feature_loss": "distance to the teacher's features",
}
"""Terms of a distillation's loss in metrics.jsonl."""
OUR_COLOR, PEER_COLOR = "#1f6fb4", "#b4641f"
NAME_PLACES = (
    ((6, 4), "left"), ((-6, -12), "right"), ((6, -12), "left"), ((-6, 4), "right"), ((0, 10), "center"),
    ((0, -20), "center"), ((6, 16), "left"), ((-6, -24), "right"),
)
"""Of a name beside its point, the first one that is free: offset in points, horizontal alignment."""


def _colors() -> list[str]:
    return matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]


class _PlainLogFormatter(LogFormatter):
    """Labels where LogFormatter has them, as plain numbers: 0.1 instead of 10^-1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def set_log(axes: Axes, names: str = "y") -> None:
    """Logarithmic axes ("y", "x" or both) with plain numbers."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(_PlainLogFormatter())
        axis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(1, 0.4)))


def tidy(panels: Sequence[Axes]) -> None:
    """A light grid, and no frame above and on the right."""
    for axes in panels:
        axes.grid(alpha=0.3, which="both" if axes.get_yscale() == "log" else "major")
        axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically: a failure leaves no partial file."""
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


METRICS = ("loss", "grad_norm", "images_per_second")
"""Numbers in every line of metrics.jsonl."""
FURTHER = (*DISTILLATION, "held_out_loss")
"""Numbers in some of its lines."""
SCORES = ("score", "images")
"""And of scores.jsonl."""
LARGEST = 1e100
"""Of them; whole numbers of a file may be beyond all floats."""


def read_metrics(path: Path, keys: Sequence[str] = METRICS, *, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a truncated one, as a killed or running process leaves it, is skipped.

    Args:
        path: of the file.
        keys: numbers that each line must have besides its step.
        may_be_empty: the file may have no line yet.

    Raises:
        OSError: when it cannot be read.
        ValueError: when there is no complete line, or one is not of a run.
    """
    lines = []
    for number, text in enumerate(read_text(path).splitlines(), 1):
        try:
            line = parse_json(text)
        except ValueError:
            continue
        further = [key for key in FURTHER if isinstance(line, dict) and key in line]
        for key in ("step", *keys, *further):
            value = line.get(key) if isinstance(line, dict) else None
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
                raise ValueError(
                    f"{path} is not of a training run: line {number} has {key}={shown(value, 40)}, not a number below "
                    "1e100")
        lines.append(line)
    if not lines and not may_be_empty:
        raise ValueError(f"{path} has no lines yet; let the run make some steps")
    return lines


def _verbatim(text: str) -> str:
    """Text for matplotlib, which would read formulas between dollar signs."""
    return text.replace("$", r"\$")


def _running_mean(values: Sequence[float], span: int) -> np.ndarray:
    """Mean of each value and the span - 1 before it (fewer at the beginning)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return (sums[ends] - sums[starts]) / (ends - starts)


def run_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, smooth: float = 0.02,
    scores: Mapping[str, Sequence[Mapping[str, Any]]] | None = None, note: str | None = None,
) -> None:
    """Draw loss, gradient norm, images per second and quick scores of one or several runs over the optimizer steps.

    Args:
        runs: lines of each run's metrics.jsonl, by the run's name (see `read_metrics`).
        path: a PNG.
        smooth: span of the running mean as a share of the run; 0 draws the logged values alone.
        scores: lines of each run's scores.jsonl, where there is one, by the run's name.
        note: above the losses, of several runs.
    """
    scores = scores or {}
    heights = (2.2, 1, 1, 1) if scores else (2.2, 1, 1)
    figure = Figure(figsize=(8, 2 * sum(heights)))
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    colors = _colors()
    for number, (name, lines) in enumerate(runs.items()):
        color = colors[number % len(colors)]
        _draw_run(panels, name, lines, color, smooth, is_alone=len(runs) == 1)
        if name in scores:
            latest = {line["step"]: line["score"] for line in scores[name]}     # a step done again replaces the first
            panels[3].plot(*zip(*sorted(latest.items()), strict=True), "o-", color=color, markersize=4)
    panels[0].set(ylabel="loss", title=_verbatim(next(iter(runs)) if len(runs) == 1 else note or ""))
    panels[0].title.set_wrap(True)
    panels[1].set(ylabel="gradient norm")
    set_log(panels[1])
    panels[2].set(ylabel="images / s", ylim=(0, None))
    if scores:
        names = {f"{line.get('name')}, {line['images']} images" for lines in scores.values() for line in lines}
        panels[3].set(ylabel=names.pop() if len(names) == 1 else "score")
        set_log(panels[3])
    panels[-1].set(xlabel="optimizer step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    losses = sorted(float(line["loss"]) for lines in runs.values() for line in lines)
    has_terms = len(runs) == 1 and any("task_loss" in line for lines in runs.values() for line in lines)
    if has_terms or losses[-1] > 3 * losses[int(0.95 * len(losses))]:           # the largest would flatten the rest
        set_log(panels[0])
    tidy(panels)
    if len(runs) > 1 or len(panels[0].get_legend_handles_labels()[0]) > 1:
        panels[0].legend(frameon=False, fontsize="small")
    figure.align_ylabels(panels)
    save_figure(figure, path)


def _draw_run(
    panels: Sequence[Axes], name: str, lines: Sequence[Mapping[str, Any]], color: str, smooth: float, is_alone: bool
) -> None:
    """One run's loss, gradient norm and images per second; held-out losses as dots."""
    steps = [line["step"] for line in lines]
    span = max(1, round(smooth * len(lines)))
    name = _verbatim(name)
    logged, mean, held_out = ("as logged", "running mean", "held-out images") if is_alone else (
        None, name, f"{name}, held out")
    for axes, key in zip(panels, METRICS, strict=False):
        values = [float(line[key]) for line in lines]
        if span > 1:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8, label=logged)
        label = mean if span > 1 or not is_alone else logged
        dot = "o" if len(steps) == 1 else None                                  # no line to see
        axes.plot(steps, _running_mean(values, span), color=color, linewidth=1.6, marker=dot, label=label)
    if is_alone:                                                                # of a distillation
        for number, (key, label) in enumerate(DISTILLATION.items(), start=1):
            terms = [(line["step"], line[key]) for line in lines if key in line]
            if terms:
                panels[0].plot(*zip(*terms, strict=True), color=_colors()[number], linewidth=1, label=label)
    points = [(line["step"], loss) for line in lines if (loss := line.get("held_out_loss")) is not None]
    if points:
        panels[0].plot(
            *zip(*points, strict=True), "o", color=color, markersize=4, markeredgecolor="white", label=held_out
        )


def cost_curves(
    rows: Sequence[Mapping[str, Any]], multiply_adds: Mapping[str, Sequence[tuple[int, int]]], path: Path
) -> None:
    """Draw time and multiply-adds of an image against its tokens, as `lamamba bench` measured them; log-log.

    The tokens are LaMamba's, one for each latent pixel; a transformer with patch 2 has a quarter as many.

    Args:
        rows: of a benchmark's result.
        multiply_adds: of each model, (side of the image in pixels, multiply-adds).
        path: a PNG.
    """
    def tokens(image_size: int) -> float:
        return (image_size / LATENT_SCALE) ** 2

    figure = Figure(figsize=(10, 4.6))
    left, right = figure.subplots(1, 2)
    further = itertools.cycle(_colors()[2:])
    ours, peers = (itertools.chain([color], further) for color in (OUR_COLOR, PEER_COLOR))
    for model, points in multiply_adds.items():
        is_peer = any(row["is_peer"] for row in rows if row["model"] == model)
        color, style = (next(peers), "s--") if is_peer else (next(ours), "o-")
        name = _network_name(model, is_peer)
        mine = sorted((row["image_size"], row["ms"] / row["batch"]) for row in rows if row["model"] == model)
        left.plot([tokens(size) for size, _ in mine], [ms for _, ms in mine], style, color=color, label=name)
        right.plot([tokens(size) for size, _ in points], [n / 1e9 for _, n in points], style, color=color, label=name)
    left.set(title=f"time of an image ({rows[0]['mode']}, {rows[0]['dtype']}, {rows[0]['device']})", ylabel="ms")
    right.set(title="multiply-adds of an image", ylabel="G multiply-adds")
    timed = sorted({row["image_size"] for row in rows})
    drawn = sorted({size for points in multiply_adds.values() for size, _ in points})
    for axes, sizes in ((left, timed), (right, drawn)):
        axes.set(xscale="log", yscale="log", xlabel="tokens (image side)")
        axes.set_xticks([tokens(size) for size in sizes], [f"{tokens(size):,.0f}\n{size} px" for size in sizes])
        axes.minorticks_off()
        _power_lines(axes, [tokens(size) for size in sizes])
        axes.legend(frameon=False)
    tidy((left, right))
    save_figure(figure, path)


def efficiency_points(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw images per second over multiply-adds of an image, a point for each network; log-log.

    Networks on one line use the machine equally well: a line's figure is the multiply-adds per second as a share of
    those of one large matrix product.

    Args:
        rows: of a benchmark's result.
        path: a PNG.
    """
    save_figure(_efficiency_figure(rows), path)


def _efficiency_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.5, 6.5))
    axes = figure.subplots()
    first, sizes = rows[0], {row["image_size"] for row in rows}
    for row in rows:
        color, marker, above = (PEER_COLOR, "s", 2) if row["is_peer"] else (OUR_COLOR, "o", 3)
        point = row["multiply_adds"] / 1e9, row["images_per_second"]
        axes.plot(*point, marker, color=color, markersize=6, zorder=above)
    size = f"{first['image_size']} px, " if len(sizes) == 1 else ""
    axes.set(
        xlabel="G multiply-adds of an image, forward pass", ylabel="images / s",
        title=f"{first['mode']}, {size}{first['dtype']}, {first['device']}, batch {first['batch']}; "
              "lines: share of one large product's multiply-adds/s",
    )
    set_log(axes, "xy")
    axes.margins(0.12)
    limits = axes.get_xlim(), axes.get_ylim()
    products = [row["images_per_second"] * row["multiply_adds"] / row["share_of_product"] for row in rows]
    for share in (1.0, 0.5, 0.25, 0.125):
        ends, rate = np.asarray(limits[0]), share * float(np.median(products)) / 1e9
        axes.plot(ends, rate / ends, ":", color="grey", linewidth=1, zorder=0)
        left = max(ends[0], rate / limits[1][1])                                # where the line enters the picture
        axes.annotate(
            f"{100 * share:g} %", (left, rate / left), (4, -12), textcoords="offset points", color="grey",
            fontsize="small", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set(xlim=limits[0], ylim=limits[1])
    tidy([axes])
    figure.tight_layout()
    _name_points(axes, rows, with_size=len(sizes) > 1)
    return figure


def _name_points(axes: Axes, rows: Sequence[Mapping[str, Any]], with_size: bool) -> None:
    """Write names beside their points, at the first place that neither another name nor a point has."""
    points = [(row["multiply_adds"] / 1e9, row["images_per_second"]) for row in rows]
    taken = [Bbox([at - 5, at + 5]) for at in axes.transData.transform(points)]
    for row, point in sorted(zip(rows, points, strict=True), key=lambda pair: pair[1]):
        text = _network_name(row["model"], row["is_peer"]) + (f", {row['image_size']} px" if with_size else "")
        for offset, side in NAME_PLACES:
            name = axes.annotate(
                text, point, offset, textcoords="offset points", fontsize="small", ha=side,
                color=PEER_COLOR if row["is_peer"] else OUR_COLOR,
                path_effects=[withStroke(linewidth=3, foreground="white")],     # lines do not cross the names
            )
            if not any(name.get_window_extent().overlaps(box) for box in taken):
                break
            name.remove()
        else:
            axes.add_artist(name)                                               # crowded: over its neighbours
        taken.append(name.get_window_extent())


def _network_name(model: str, is_peer: bool) -> str:
    return model if is_peer else f"LaMamba-{model.upper()}"


def _power_lines(axes: Axes, tokens: Sequence[float]) -> None:
    """Thin lines that grow as the tokens (below the lowest last point) and as their square (above the highest)."""
    if len(tokens) < 2:
        return
    heights, limits = [float(np.asarray(line.get_ydata())[-1]) for line in axes.lines], axes.get_ylim()
    for power, last, name in ((1, min(heights) / 1.6, "linear"), (2, max(heights) * 1.6, "quadratic")):
        first = last * (tokens[0] / tokens[-1]) ** power
        axes.plot([tokens[0], tokens[-1]], [first, last], ":", color="grey", linewidth=1)
        axes.annotate(
            name, (tokens[-1], last), (0, -20 if power == 1 else 4), textcoords="offset points", color="grey",
            ha="right",
        )
    axes.set_ylim(limits[0] / 2, limits[1] * 2)


def evaluation_curves(entries: Sequence[Mapping[str, Any]], distance: str, path: Path) -> None:
    """Draw the Fréchet distance over training, with precision and recall, or over guidance and against recall.

    The best entry is ringed and named. Bars are standard deviations over seed ranges.

    Args:
        entries: of a result of `lamamba.evaluate`, as dictionaries; all of one guidance scale, or of one checkpoint.
        distance: name of the Fréchet distance.
        path: a PNG.
    """
    is_sweep = len({entry["guidance"] for entry in entries}) > 1
    x = "guidance" if is_sweep else "step"
    has_recall = all("recall" in entry["figures"] for entry in entries)
    figure = Figure(figsize=(11 if has_recall else 6.5, 4.6))
    panels = figure.subplots(1, 2 if has_recall else 1, squeeze=False)[0]
    best = min(entries, key=lambda entry: entry["figures"]["frechet"])
    averages: dict[str, list[Mapping[str, Any]]] = {str(entry["ema"]): [] for entry in entries}
    for entry in sorted(entries, key=lambda entry: entry[x] or 0):
        averages[str(entry["ema"])].append(entry)

    left = panels[0]
    for (name, curve), style in zip(averages.items(), _curve_styles(), strict=False):
        label = "trained weights" if name == "none" else f"EMA {name}"
        left.errorbar([entry[x] or 0 for entry in curve], *_with_spread(curve, "frechet"), **style, label=label)
    _ring_best(left, best[x] or 0, entries)
    left.set_ylabel(f"{distance}, lower is better")
    at = f"guidance {best['guidance']:g}" if is_sweep else f"step {best['step'] or 0:,}"
    at += f", EMA {best['ema']}" if len(averages) > 1 and best["ema"] != "none" else ""
    left.set(
        xlabel="guidance scale" if is_sweep else "optimizer step",
        title=f"ringed: {best['figures']['frechet']:.4g} at {at}",
    )
    if len(averages) > 1:
        left.legend(frameon=False, fontsize="small")
    if has_recall and is_sweep:
        _draw_against_recall(panels[1], averages.values(), best, entries)
        panels[1].set_ylabel(distance)
    elif has_recall:
        _draw_precision_and_recall(panels[1], averages.values())
    for axes in panels:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10], integer=not is_sweep))
        axes.xaxis.set_major_formatter("{x:g}" if is_sweep else "{x:,.0f}")
    tidy(panels)
    save_figure(figure, path)


def _curve_styles() -> Iterator[dict[str, Any]]:
    """Arguments of errorbar for one curve after the other."""
    for color in itertools.cycle(_colors()):
        yield {"color": color, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.6}


def _ring_best(axes: Axes, x: float, entries: Sequence[Mapping[str, Any]]) -> None:
    """Ring the lowest distance, at x, and scale the axis of distances."""
    distances = [entry["figures"]["frechet"] for entry in entries]
    lowest, highest = min(distances), max(distances)
    axes.plot([x], [lowest], "o", markersize=12, markerfacecolor="none", markeredgecolor="black")
    if lowest > 0 and highest > 20 * lowest:                                    # the beginning would hide the end
        set_log(axes)
    else:
        axes.set_ylim(0, 1.15 * max(e["figures"]["frechet"] + e["spread"].get("frechet", 0) for e in entries))


def _draw_against_recall(
    axes: Axes, curves: Iterable[Sequence[Mapping[str, Any]]], best: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
) -> None:
    """The distance against recall, with the guidance scale of each point."""
    for curve, style in zip(curves, _curve_styles(), strict=False):
        recalls, spreads = _with_spread(curve, "recall")
        axes.errorbar(recalls, *_with_spread(curve, "frechet"), xerr=spreads, **style)
        for entry in curve:                                                     # outside of the curve's bend
            point = (entry["figures"]["recall"], entry["figures"]["frechet"])
            offset, side = ((0, -20), "center") if entry is best else (
                ((-8, -11), "right") if entry["guidance"] > best["guidance"] else ((8, -11), "left"))
            axes.annotate(f"{entry['guidance']:g}", point, offset, textcoords="offset points", ha=side)
    _ring_best(axes, best["figures"]["recall"], entries)
    axes.set(xlabel="recall", title="numbers: guidance scale")
    axes.margins(x=0.12)


def _draw_precision_and_recall(axes: Axes, curves: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """Both over the optimizer steps, in the colours of the distances; without bars, which would hide each other."""
    for curve, style in zip(curves, _curve_styles(), strict=False):
        steps = [entry["step"] or 0 for entry in curve]
        axes.errorbar(steps, _with_spread(curve, "precision")[0], **style)
        axes.errorbar(steps, _with_spread(curve, "recall")[0], **{**style, "marker": "s"}, linestyle="--")
    axes.set(xlabel="optimizer step", ylabel="share", title="quality (precision) and variety (recall)")
    axes.set_ylim(0, min(1.05, max(1.2 * axes.get_ylim()[1], 0.1)))
    for line, name in (("o-", "precision"), ("s--", "recall")):
        axes.plot([], [], line, color="grey", markersize=4, label=name)
    axes.legend(frameon=False, fontsize="small", loc="upper left")


def _with_spread(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float] | None]:
    """A figure of each entry, and its standard deviations; None where nothing was repeated."""
    spreads = [entry["spread"].get(key, 0.0) for entry in entries]
    return [entry["figures"][key] for entry in entries], spreads if any(spreads) else None


def scaling_curves(rows: Mapping[str, Sequence[tuple[int, float, float, int]]], memory: float, path: Path) -> None:
    """Draw images per second, the share of time that devices compute, and their memory over the number of devices.

    Args:
        rows: by the way of training, (devices, images per second, share, bytes).
        memory: of a device, in bytes.
        path: a PNG.
    """
    figure = Figure(figsize=(13, 4.2))
    panels = figure.subplots(1, 3)
    for name, points in rows.items():
        devices, speeds, shares, sizes = zip(*points, strict=True)
        for axes, values in zip(panels, (speeds, shares, [size / 2**30 for size in sizes]), strict=True):
            axes.plot(devices, values, "o-", markersize=4, label=name)
    panels[0].set(yscale="log", ylabel="images / s", title="speed, estimated")
    panels[1].set(ylabel="share", ylim=(0, 1.05), title="time spent computing")
    panels[2].set(ylabel="GiB", yscale="log", title="memory of a device")
    panels[2].axhline(memory / 2**30, linestyle=":", color="grey")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("devices")
        axes.xaxis.set_major_formatter("{x:g}")
    panels[0].legend(frameon=False)
    tidy(panels)
    save_figure(figure, path)
