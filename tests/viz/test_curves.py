"""Curves of runs, drawn without touching a notebook's matplotlib; damaged files are named."""

from __future__ import annotations

import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from lamamba.viz.curves import efficiency_points, read_metrics, run_curves


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
    with pytest.raises(ValueError, match="line 1 has loss=10{39}, not a number below 1e100"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no lines yet"):
        read_metrics(path)


def test_a_network_more_is_a_point_more(tmp_path):
    def row(model, giga, share):
        return {"model": model, "image_size": 256, "batch": 1, "mode": "forward", "dtype": "float32", "device": "cpu",
                "is_peer": model != "xl", "multiply_adds": giga * 1e9, "images_per_second": share * 80 / giga,
                "product_multiply_adds_per_second": 80e9}

    rows = [row("xl", 45, 0.8), row("ldm-8", 57, 0.4), row("dit-xl-2", 118, 0.8)]
    efficiency_points(rows, tmp_path / "some.png")
    efficiency_points([*rows, row("adm-256", 1120, 0.8)], tmp_path / "more.png")
    some, more = (matplotlib.image.imread(tmp_path / name) for name in ("some.png", "more.png"))
    assert some.shape == more.shape
    assert np.abs(some - more).max() > 0.5
