"""Pictures for people: grids of samples and training curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lamamba.config import LATENT_SCALE
from lamamba.utils.files import settle, temporary_name

CELL_PIXELS = 48
"""Small images are enlarged (bicubic, which eyes read far better than blocks) until a cell is about this wide."""
GAP, BACKGROUND, INK = 6, 255, 60


def grid_picture(
    images: np.ndarray, columns: int, row_names: Sequence[str] = (), *, cell_pixels: int = CELL_PIXELS,
    crisp: bool = False,
) -> Image.Image:
    """uint8 images (n, h, w, c) as a table with gaps, row by row; small ones enlarged, rows named on the left.

    Args:
        images, columns, row_names: the table.
        cell_pixels: small images are enlarged to about this width.
        crisp: show every pixel as a square, as on a page to play on, instead of between its neighbours.
    """
    count, height, width, channels = images.shape
    factor = max(1, cell_pixels // max(height, width))
    scaling = Image.Resampling.NEAREST if crisp else Image.Resampling.BICUBIC
    height, width = height * factor, width * factor
    rows = -(-count // columns)
    font = ImageFont.load_default(size=max(12, min(height // 3, 24)))
    margin = round(max((font.getlength(name) for name in row_names), default=-2 * GAP)) + 2 * GAP
    shape = (rows * (height + GAP) + GAP, margin + columns * (width + GAP) + GAP)
    canvas = np.full((*shape, 3), BACKGROUND, dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = GAP + k // columns * (height + GAP), margin + GAP + k % columns * (width + GAP)
        cell = Image.fromarray(image if channels == 3 else image[..., 0])
        enlarged = np.asarray(cell.resize((width, height), scaling))
        canvas[top : top + height, left : left + width] = enlarged.reshape(height, width, -1)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(row_names):
        middle = GAP + row * (height + GAP) + height / 2
        draw.text((margin - GAP, middle), name, fill=(INK, INK, INK), font=font, anchor="rm")
    return picture


def bare_picture(image: np.ndarray) -> Image.Image:
    """One uint8 image (h, w, c) as it is."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_picture(picture: Image.Image, path: Path, text: PngImagePlugin.PngInfo | None = None) -> None:
    """Write a PNG, with text about it, so that a failure leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        picture.save(temporary, format="PNG", pnginfo=text)
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_figure(figure: Any, path: Path) -> None:
    """The same for a plot, which is closed."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        figure.savefig(temporary, dpi=120, format="png")
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def loss_curve(metrics: Path, path: Path) -> None:
    """Draw the loss and the gradient norm of a run's metrics.jsonl over its steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1))
    top.plot(steps, [line["loss"] for line in lines], color="#1f6fb4")
    top.set(ylabel="loss", title="training loss")
    bottom.plot(steps, [line["grad_norm"] for line in lines], color="#b4641f")
    bottom.set(ylabel="gradient norm", xlabel="optimizer step", yscale="log")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save_figure(figure, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that is cut off is left out.

    Raises:
        ValueError: when no line is whole.
    """
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:                                            # a run that was killed, or still runs
            continue
    if not lines:
        raise ValueError(f"{path} has no lines yet; let the run make some steps")
    return lines


def _running_mean(values: list[float], span: int) -> np.ndarray:
    """Mean over the span before and up to each value; over what there is at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return (sums[ends] - sums[starts]) / (ends - starts)


def run_curves(
    runs: dict[str, list[dict[str, Any]]], path: Path, smooth: float, scores: dict[str, list[dict[str, Any]]]
) -> None:
    """Draw loss, gradient norm, images per second and quick scores of runs, given by name as lines of their files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = (2.2, 1, 1, 1) if scores else (2.2, 1, 1)
    figure, panels = plt.subplots(len(heights), 1, figsize=(8, 2 * sum(heights)), sharex=True, height_ratios=heights)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for number, (name, lines) in enumerate(runs.items()):
        color = colors[number % len(colors)]
        steps = [line["step"] for line in lines]
        span = max(1, round(smooth * len(lines)))
        for axes, key in zip(panels, ("loss", "grad_norm", "images_per_second"), strict=False):
            values = [float(line[key]) for line in lines]
            if span > 1:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, span), color=color, linewidth=1.6, label=name)
        held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
        if held_out:
            panels[0].plot(*zip(*held_out, strict=True), "o", color=color, markersize=4, markeredgecolor="white",
                           label=f"{name}, held out")
        if name in scores:
            latest = {line["step"]: line["score"] for line in scores[name]}     # a step done again has the last word
            panels[3].plot(*zip(*sorted(latest.items()), strict=True), "o-", color=color, markersize=4)
    panels[0].set(ylabel="loss")
    panels[1].set(ylabel="gradient norm", yscale="log")
    panels[2].set(ylabel="images / s", ylim=(0, None))
    if scores:
        names = {f"{line['name']}, {line['images']} images" for lines in scores.values() for line in lines}
        panels[3].set(ylabel=names.pop() if len(names) == 1 else "score", yscale="log")
    panels[-1].set(xlabel="optimizer step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for axes in panels:
        axes.grid(alpha=0.3, which="both" if axes.get_yscale() == "log" else "major")
        axes.spines[["top", "right"]].set_visible(False)
    losses = sorted(float(line["loss"]) for lines in runs.values() for line in lines)
    if losses[-1] > 3 * losses[int(0.95 * len(losses))]:                        # the first steps would hide the others
        panels[0].set(yscale="log")
    panels[0].legend(frameon=False, fontsize="small")
    figure.align_ylabels(panels)
    _save_figure(figure, path)


def cost_curves(rows: list[dict[str, Any]], multiply_adds: dict[str, list[tuple[int, int]]], path: Path) -> None:
    """Draw what `lamamba bench` measured: time and multiply-adds of an image against its tokens, both axes logarithmic.

    The tokens are LaMamba's, one for each latent pixel; a transformer with patch 2 has a quarter as many.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def tokens(image_size: int) -> float:
        return (image_size / LATENT_SCALE) ** 2

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    for model, points in multiply_adds.items():
        color, style = ("#b4641f", "s--") if model.startswith("dit") else ("#1f6fb4", "o-")
        mine = sorted((row["image_size"], row["ms"] / row["batch"]) for row in rows if row["model"] == model)
        left.plot([tokens(size) for size, _ in mine], [ms for _, ms in mine], style, color=color, label=model)
        right.plot([tokens(size) for size, _ in points], [n / 1e9 for _, n in points], style, color=color, label=model)
    left.set(title=f"time of an image ({rows[0]['mode']}, {rows[0]['dtype']}, {rows[0]['device']})", ylabel="ms")
    right.set(title="multiply-adds of an image", ylabel="G multiply-adds")
    timed = sorted({row["image_size"] for row in rows})
    drawn = sorted({size for points in multiply_adds.values() for size, _ in points})
    for axes, sizes in ((left, timed), (right, drawn)):
        axes.set(xscale="log", yscale="log", xlabel="tokens (image side)")
        axes.set_xticks([tokens(size) for size in sizes], [f"{tokens(size):,.0f}\n{size} px" for size in sizes])
        axes.minorticks_off()
        _power_lines(axes, [tokens(size) for size in sizes])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    _save_figure(figure, path)


def _power_lines(axes: Any, tokens: list[float]) -> None:
    """Thin lines that grow as the tokens (below the lowest last point) and as their square (above the highest)."""
    if len(tokens) < 2:
        return
    heights, limits = [line.get_ydata()[-1] for line in axes.lines], axes.get_ylim()
    for power, last, name in ((1, min(heights) / 1.6, "linear"), (2, max(heights) * 1.6, "quadratic")):
        first = last * (tokens[0] / tokens[-1]) ** power
        axes.plot([tokens[0], tokens[-1]], [first, last], ":", color="grey", linewidth=1)
        axes.annotate(
            name, (tokens[-1], last), (0, -20 if power == 1 else 4), textcoords="offset points", color="grey",
            ha="right",
        )
    axes.set_ylim(limits[0] / 2, limits[1] * 2)


def evaluation_curves(entries: list[dict[str, Any]], distance: str, path: Path) -> None:
    """Draw what `lamamba evaluate` found: the distance over training, or over guidance and against recall.

    The best one is ringed and named. Bars are standard deviations over seed ranges.

    Args:
        entries: of a result; all of one guidance scale, or all of one checkpoint.
        distance: what the Fréchet distance is called.
        path: a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    is_sweep = len({entry["guidance"] for entry in entries}) > 1
    has_recall = all("recall" in entry["figures"] for entry in entries)
    where = "guidance" if is_sweep else "step"
    figure, panels = plt.subplots(1, 2 if has_recall else 1, figsize=(11 if has_recall else 6.5, 4.6), squeeze=False)
    left, right = panels[0][0], panels[0][-1]
    best = min(entries, key=lambda entry: entry["figures"]["frechet"])
    averages = list(dict.fromkeys(str(entry["ema"]) for entry in entries))
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for number, average in enumerate(averages):
        color = colors[number % len(colors)]
        mine = sorted((e for e in entries if str(e["ema"]) == average), key=lambda e: e[where] or 0)
        places = [entry[where] or 0 for entry in mine]
        line = {"color": color, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.6}
        name = "trained weights" if average == "none" else f"EMA {average}"
        left.errorbar(places, *_with_spread(mine, "frechet"), **line, label=name)
        if has_recall and is_sweep:
            recalls, recall_spreads = _with_spread(mine, "recall")
            right.errorbar(recalls, *_with_spread(mine, "frechet"), xerr=recall_spreads, **line)
            for place, entry in zip(places, mine, strict=True):                 # outside of the curve's bend
                spot = (entry["figures"]["recall"], entry["figures"]["frechet"])
                offset, side = ((0, -20), "center") if entry is best else (
                    ((-8, -11), "right") if place > best["guidance"] else ((8, -11), "left"))
                right.annotate(f"{place:g}", spot, offset, textcoords="offset points", ha=side)
        elif has_recall:                                                        # bars would hide each other
            right.errorbar(places, _with_spread(mine, "precision")[0], **line)
            right.errorbar(places, _with_spread(mine, "recall")[0], **{**line, "marker": "s"}, linestyle="--")

    lowest, highest = best["figures"]["frechet"], max(entry["figures"]["frechet"] for entry in entries)
    spots = [(left, best[where] or 0)] + ([(right, best["figures"]["recall"])] if has_recall and is_sweep else [])
    for axes, place in spots:
        axes.plot([place], [lowest], "o", markersize=12, markerfacecolor="none", markeredgecolor="black")
        axes.set_ylabel(distance + (", lower is better" if axes is left else ""))
        if lowest > 0 and highest > 20 * lowest:                                # the beginning would hide the end
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        else:
            axes.set_ylim(0, 1.15 * max(e["figures"]["frechet"] + e["spread"].get("frechet", 0) for e in entries))
    at = f"guidance {best['guidance']:g}" if is_sweep else f"step {best['step'] or 0:,}"
    at += f", EMA {best['ema']}" if len(averages) > 1 and best["ema"] != "none" else ""
    left.set(xlabel="guidance scale" if is_sweep else "optimizer step", title=f"ringed: {lowest:.4g} at {at}")
    if len(averages) > 1:
        left.legend(frameon=False, fontsize="small")
    if has_recall and is_sweep:
        right.set(xlabel="recall", title="numbers: guidance scale")
        right.margins(x=0.12)
    elif has_recall:
        right.set(xlabel="optimizer step", ylabel="share", title="quality (precision) and variety (recall)")
        right.set_ylim(0, min(1.05, max(1.2 * right.get_ylim()[1], 0.1)))
        for style, name in (("o-", "precision"), ("s--", "recall")):            # colours are those on the left
            right.plot([], [], style, color="grey", markersize=4, label=name)
        right.legend(frameon=False, fontsize="small", loc="upper left")
    for axes in panels[0]:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10], integer=not is_sweep))
        axes.xaxis.set_major_formatter("{x:g}" if is_sweep else "{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save_figure(figure, path)


def _with_spread(entries: list[dict[str, Any]], key: str) -> tuple[list[float], list[float] | None]:
    """A figure of each entry, and its standard deviations; None where nothing was repeated."""
    spreads = [entry["spread"].get(key, 0.0) for entry in entries]
    return [entry["figures"][key] for entry in entries], spreads if any(spreads) else None
