"""Curves of runs, drawn without touching a notebook's matplotlib; damaged files are named."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from lamamba.viz import curves
from lamamba.viz.curves import _efficiency_figure, cost_curves, read_metrics, run_curves


def lines(steps, **more):
    return [
        {"step": step, "loss": 1 / step**0.5, "grad_norm": 2.0, "images_per_second": 100.0, **more}
        for step in range(1, steps + 1)
    ]


def test_drawing_leaves_pyplot_and_its_backend_alone(tmp_path):
    code = """\
import sys
from pathlib import Path
from lamamba.viz.curves import run_curves
run_curves({"a": [{"step": 1, "loss": 1.0, "grad_norm": 1.0, "images_per_second": 1.0}]}, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0


def test_one_run_needs_no_more_than_its_lines(tmp_path):
    run_curves({"a": lines(100)}, tmp_path / "deep" / "one.png")
    run_curves({"a": lines(100)}, tmp_path / "scored.png", scores={"a": [
        {"step": step, "name": "FD", "images": 20, "score": 1 / step} for step in (50, 100)
    ]})
    plain, scored = (matplotlib.image.imread(path) for path in (tmp_path / "deep" / "one.png", tmp_path / "scored.png"))
    assert scored.shape[0] > plain.shape[0]                                     # a panel more


def test_the_running_mean_spans_a_share_of_the_run(tmp_path):
    noisy = [{**line, "loss": line["loss"] + (line["step"] % 2)} for line in lines(100)]
    for smooth in (0.0, 0.5):
        run_curves({"a": noisy}, tmp_path / f"{smooth}.png", smooth)
    rough, smoothed = (matplotlib.image.imread(tmp_path / f"{smooth}.png") for smooth in (0.0, 0.5))
    assert np.abs(rough - smoothed).max() > 0.5


def test_a_truncated_line_is_skipped_and_a_file_without_lines_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(3)) + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    path.write_text(json.dumps({**lines(1)[0], "loss": 10**400}))
    with pytest.raises(ValueError, match=r"line 1 has loss=10{36}\.\.\., not a number below 1e100"):
        read_metrics(path)
    for key in ("held_out_loss", "task_loss"):
        path.write_text(json.dumps({**lines(1)[0], key: "low"}))
        with pytest.raises(ValueError, match=f"line 1 has {key}='low', not a number"):
            read_metrics(path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no lines yet"):
        read_metrics(path)


def timed(model, giga, images_per_second, size=256):
    return {"model": model, "image_size": size, "batch": 1, "mode": "forward", "dtype": "float32", "device": "cpu",
            "is_peer": model != "xl", "multiply_adds": giga * 1e9, "images_per_second": images_per_second,
            "share_of_product": images_per_second * giga / 200}


CLOSE = [timed("dit-b-2", 106.38, 1.29), timed("dit-xl-4", 118.66, 1.38), timed("u-vit-h-4", 133.23, 1.32),
         timed("xl", 107, 1.2), timed("adm-512", 1982, 0.1), timed("dit-s-4", 6, 18)]


@pytest.mark.parametrize("rows", [CLOSE, CLOSE[:2], [*CLOSE[3:], timed("xl", 430, 0.3, size=512)]])
def test_names_of_networks_lie_over_no_other_name_and_no_point(rows):
    (axes,) = _efficiency_figure(rows).axes
    names = [text for text in axes.texts if not text.get_text().endswith(" %")]
    found = {text.get_text().partition(",")[0] for text in names}
    assert found == {"LaMamba-XL" if row["model"] == "xl" else row["model"] for row in rows}
    assert len(names) == len(rows)
    boxes = [text.get_window_extent() for text in names]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    points = axes.transData.transform([(row["multiply_adds"] / 1e9, row["images_per_second"]) for row in rows])
    assert not any(box.contains(*point) for box in boxes for point in points)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_line_of_a_product_is_its_multiply_adds_per_second(mode):
    """One pass of a product's 200 G multiply-adds/s; a training step is three."""
    passes = 3 if mode == "train" else 1
    rows = [{**row, "mode": mode, "share_of_product": passes * row["share_of_product"]} for row in CLOSE]
    (axes,) = _efficiency_figure(rows).axes
    line = next(line for line in axes.lines if line.get_linestyle() == ":")
    x, y = line.get_data()
    assert x * y == pytest.approx(200 / passes)
    labels = [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")]
    assert all(float(label) > 0 for label in labels if label)                   # plain numbers


def test_every_network_has_a_color_of_its_own(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append(figure))
    rows = [{**row, "ms": 1000 / row["images_per_second"]} for row in CLOSE[:4]]
    cost_curves(rows, {row["model"]: [(256, 1e9), (512, 5e9)] for row in rows}, tmp_path / "cost.png")
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["dit-b-2", "dit-xl-4", "u-vit-h-4", "LaMamba-XL"]
    assert len({line.get_color() for line in legend.get_lines()}) == 4
