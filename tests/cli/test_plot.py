"""lamamba plot, and lamamba.plot: one picture of one or several runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import lamamba as package


def write_run(folder, steps, *, speed=100.0, held_out=False):
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "loss": 1 / step**0.5, "grad_norm": 2.0, "images_per_second": speed,
         **({"held_out_loss": 1.1 / step**0.5} if held_out and step % 50 == 0 else {})}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')


def test_plot_draws_one_or_several_runs(lamamba, tmp_path):
    write_run(tmp_path / "a", 200, held_out=True)
    write_run(tmp_path / "b", 100, speed=50.0)
    status, out, err = lamamba("plot", "a", "--out", "one.png")
    assert (status, out) == (0, "one.png: a to step 200\n"), err
    assert lamamba("plot", "a", "b", "--out", "pictures/two.png")[0] == 0
    one, two = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in ("one.png", "pictures/two.png"))
    orange = [(np.abs(picture - (255, 127, 14)).sum(-1) < 30).sum() for picture in (one, two)]
    assert orange[0] == 0                                                       # the second run's colour
    assert orange[1] > 500


def test_names_of_runs_are_no_formulas(lamamba, tmp_path):
    for name in ("$x^$", "$y_{$"):
        write_run(tmp_path / name, 3)
    assert lamamba("plot", "$x^$", "--out", "one.png")[0] == 0
    assert lamamba("plot", "$x^$", "$y_{$", "--out", "two.png")[0] == 0


def test_plot_from_python_is_a_picture_in_a_notebook(tmp_path):
    write_run(tmp_path / "a", 20)
    result = package.plot(package.PlotOptions(runs=[tmp_path / "a"], out=tmp_path / "a.png", smooth=0))
    assert result.last_steps == {str(tmp_path / "a"): 20}
    assert result._repr_png_() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(("change", "said"), [
    ({}, None),
    ({"architecture": {"objective": "noise"}}, "objective (flow, noise)"),
    ({"train": {"loss": {"weighting": "min-snr"}}}, "weighting (min-snr, none)"),
    ({"train": {"loss": {"timesteps": "uniform"}}}, "drawing of times (None, uniform)"),
    ({"data": {"fingerprint": "b"}}, "data"),
    (None, None),                                                               # a log alone
])
def test_losses_that_cannot_be_compared_are_said_to_be(tmp_path, monkeypatch, change, said):
    config = {"architecture": {"objective": "flow"}, "train": {}, "data": {"fingerprint": "a"}}
    for name, values in (("a", config), ("b", None if change is None else {**config, **change})):
        write_run(tmp_path / name, 20)
        if values is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(values))
    drawn = []
    monkeypatch.setattr("lamamba.viz.curves.save_figure", lambda figure, path: (drawn.append(figure), path.touch()))
    result = package.plot(package.PlotOptions(runs=[tmp_path / "a", tmp_path / "b"], out=tmp_path / "ab.png"))
    note = f"losses cannot be compared: the runs differ in {said}" if said else None
    assert (result.note, drawn[0].axes[0].get_title()) == (note, note or "")
    assert str(result).startswith(note or str(result.path))


@pytest.mark.parametrize(("values", "said"), [
    ({"architecture": "flow"}, "architecture='flow' must be named values"),
    ({"train": {"loss": [1]}}, "loss=[1] must be named values"), ({"data": 3}, "data=3 must be named values"),
    ({"sampling": [[]]}, "sampling=[[]] must be named values"), ([], "it holds no JSON object"),
])
def test_a_damaged_configuration_beside_a_log_is_named(lamamba, tmp_path, values, said):
    write_run(tmp_path / "a", 3)
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    status, _, err = lamamba("plot", "a", "--out", "a.png")
    assert (status, err) == (2, f"lamamba plot: a/config.json is damaged: {said}\n")


@pytest.mark.parametrize(("arguments", "said"), [
    (["empty", "--out", "a.jpg"], "out=a.jpg: the picture is a .png"),
    ([], "name at least one run"),
    (["nowhere"], "nowhere has no metrics.jsonl"),
    (["empty"], "has no lines yet"),
    (["empty", "--smooth", "2"], "smooth=2.0 must be at most 1"),
])
def test_what_cannot_be_plotted(lamamba, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    status, _, err = lamamba("plot", *arguments)
    assert (status, said in err, len(err.strip().splitlines())) == (2, True, 1), err
