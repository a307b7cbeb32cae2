"""lamamba.train and lamamba.plan from Python: results, progress, callbacks, a stop and its continuation."""

from __future__ import annotations

import logging
import signal

import pytest
import torch

import lamamba
from lamamba.data.digits import Digits
from lamamba.runs.folder import RunFolder
from lamamba.runs.metadata import default_guidance
from lamamba.runs.model import open_network
from lamamba.training.interrupt import Interrupted

TINY = dict(
    model=dict(width=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1), batch_size=4, ema_decays=(0.5,), steps=4,
    log_every=1, checkpoint_every=2, device="cpu", sampling=dict(every=4, steps=2, per_class=1),
)


def options(folder, **changes):
    return lamamba.TrainOptions.from_recipe("digits", **{"out": folder, **TINY, **changes})


def test_a_run_as_a_call_with_progress_and_result(tmp_path, capsys):
    seen, steps = [], []
    result = lamamba.train(options(tmp_path / "run"), progress=seen.append, callbacks=[lambda s: steps.append(s.step)])
    assert (result.step, result.bad_images, result.metrics["step"], steps) == (4, 0, 4, [1, 2, 3, 4])
    assert [(p.task, p.done, p.total, p.unit, p.resumed) for p in seen] == [
        ("training", step, 4, "steps", 0) for step in steps]
    assert all(word in seen[-1].note for word in ("loss", "grad", "images/s", "GiB"))
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step_00000004"
    assert len(result.metrics_file.read_text().splitlines()) == 4
    assert result.sample_grid.name == "step_00000004.png"
    assert result._repr_png_() == result.sample_grid.read_bytes()
    assert str(result).startswith(f"done: {tmp_path / 'run'}\nsample it: lamamba sample ")
    network, metadata = open_network(result.folder)
    assert all(map(torch.equal, network.parameters(), result.state.ema.parameters()))
    assert metadata.guidance == 1.75                                            # of the recipe
    assert capsys.readouterr() == ("", "")
    again = lamamba.train(options(tmp_path / "run", steps=5), progress=seen.append)
    assert (again.step, seen[-1].done, seen[-1].resumed) == (5, 5, 4)


def test_data_of_ones_own(tmp_path):
    digits = Digits()
    digits.images, digits.labels = digits.images[:6], digits.labels[:6]
    result = lamamba.train(options(tmp_path, steps=1, sampling=dict(every=0)), data=digits, progress=None)
    assert (result.step, result.sample_grid, result._repr_png_()) == (1, None, None)


def test_where_nobody_watches_some_lines_are_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lamamba.api.train.is_watched", lambda: False)
    monkeypatch.setattr("lamamba.api.train.LOG_LINES", 2)
    with caplog.at_level(logging.INFO, "lamamba"):
        lamamba.train(options(tmp_path, sampling=dict(every=0)))
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert all(word in lines[0] for word in ("loss", "gradient norm", "images/s", "GiB", "s left"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return lamamba.train(options(tmp_path_factory.mktemp("whole"), steps=5, sampling=dict(every=0)), progress=None)


@pytest.mark.parametrize(("stop", "checkpoint"), [("signal", "step_00000004"), ("error", "step_00000002")])
def test_a_stopped_call_goes_on_when_made_again(whole, tmp_path, stop, checkpoint):
    """As after an interrupted cell: a signal leaves a checkpoint of its own, an exception the last one."""
    def interrupt(step_state):
        if step_state.step == 3:
            if stop == "error":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)

    same = options(tmp_path, steps=5, sampling=dict(every=0))
    with pytest.raises(KeyboardInterrupt if stop == "error" else Interrupted):
        lamamba.train(same, progress=None, callbacks=[interrupt])
    assert RunFolder(tmp_path).names()[-1] == checkpoint
    result = lamamba.train(same, progress=None)
    assert all(map(torch.equal, whole.state.ema.parameters(), result.state.ema.parameters()))


def test_a_plan_writes_nothing(tmp_path):
    plan = lamamba.plan(options(tmp_path / "run", optimizer=dict(warmup_steps=2, cooldown_share=0.0)))
    assert (plan.images, plan.processes, plan.micro_batch) == (1797, 1, 4)
    assert plan.cost.parameters > 0
    assert "learning rate     0 to 1.0e-03 in 2 steps, then constant 1.0e-03" in str(plan)
    assert not list(tmp_path.iterdir())


def test_options_of_the_demo_are_checked():
    """The call itself is tested through the command line, which does nothing else."""
    with pytest.raises(ValueError, match="per_digit=9 must be at least 10"):
        lamamba.DemoOptions(per_digit=9)


@pytest.mark.parametrize(("saved", "classes", "expected"), [(1.75, 10, 1.75), (None, 10, 2.0), (None, 0, 1.0)])
def test_the_default_guidance_scale(saved, classes, expected):
    assert default_guidance(saved, classes) == expected
