"""A run goes on with another number of processes: the same images, and to rounding the same losses."""

from __future__ import annotations

import shutil

import numpy as np

from tests.training.test_processes import SPLIT, run
from tests.training.together import config, pytestmark, read_lines, together  # noqa: F401


def test_the_number_of_processes_may_change_at_a_restart(tmp_path, tally):
    """From one process to a split two, to two, back to one: the run that one process alone would make."""
    folder = tmp_path / "run"
    alone = run(config(batch_size=6, steps=6, checkpoint_every=3, keep_checkpoints=5), folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    for steps, count, options in ((4, 2, SPLIT), (5, 2, {}), (6, 1, {})):
        settings = config(batch_size=6, steps=steps, checkpoint_every=1, processes=options)
        (first, *_) = together(count, run, settings, folder)
        np.testing.assert_allclose(first["losses"], alone["losses"][steps - 1 : steps], rtol=2e-5)
    for (p, q) in zip(first["ema"], alone["ema"], strict=True):
        np.testing.assert_allclose(p, q, atol=1e-3)
    started = [event for event in read_lines(folder, "events.jsonl") if event["event"] == "resumed"]
    assert [event["processes"] for event in started] == [2, 2, 1]
    tally("5 another number of processes at a restart, DDP or split", 3, 3)
