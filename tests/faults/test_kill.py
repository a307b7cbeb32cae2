"""SIGKILL at random moments, half of them in the middle of a save: no checkpoint is ever lost or half."""

from __future__ import annotations

import json
import os
import random
import signal
import time

from lamamba.runs.folder import RunFolder
from lamamba.training.loop import train
from tests.files import hashes
from tests.training.together import FewDigits, config, pytestmark, start, states_equal  # noqa: F401

FOREVER = 10**6
SETTINGS = dict(batch_size=4, checkpoint_every=2, ema_decays=(0.5, 0.9))


def job(folder):
    train(config(steps=FOREVER, **SETTINGS), FewDigits(5), folder)


def is_whole(checkpoint) -> bool:
    """By the manifest alone, with nothing of the code under test."""
    found = hashes(checkpoint)
    del found["manifest.json"]
    return found == json.loads((checkpoint / "manifest.json").read_text())["files"]


def events(folder):
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def half_saves(folder):
    """Saves that have written something and are not renamed yet, identified by their last change."""
    found = set()
    for path in (folder / "checkpoints").glob(".tmp_step_*"):
        try:
            if any(child.is_file() for child in path.rglob("*")):
                found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:                                               # renamed in between
            continue
    return found


def saves_of(folder):
    """How long each save took, in seconds."""
    return [event["seconds"] for event in events(folder) if event["event"] == "saved"]


def kill_during_save(process, folder, chance):
    """Let it make some saves, wait for the first write of the next, then a random while, then kill."""
    deadline = time.monotonic() + 60
    enough = len(saves_of(folder)) + chance.randrange(4)
    while time.monotonic() < deadline and len(saves_of(folder)) < enough:
        time.sleep(0.001)
    known, seconds = half_saves(folder), sorted(saves_of(folder))
    usual = seconds[len(seconds) // 2] if seconds else 0.05
    while time.monotonic() < deadline and half_saves(folder) <= known:
        pass
    time.sleep(chance.uniform(0, usual))
    os.kill(process.pid, signal.SIGKILL)


def test_killed_at_any_moment_a_run_goes_on_from_a_whole_checkpoint(tmp_path, count, tally):
    trials, chance, folder = count(6, 50), random.Random(0), tmp_path / "run"
    survivals = {"during a save": [], "at another moment": []}
    while len(survivals["during a save"]) < trials // 2 or sum(map(len, survivals.values())) < trials:
        assert sum(map(len, survivals.values())) < 4 * trials, "too few kills fell into a save"
        names, lines, half = RunFolder(folder).names(), len(events(folder)), half_saves(folder)
        process, _ = start(job, folder)
        if len(survivals["during a save"]) <= len(survivals["at another moment"]):
            kill_during_save(process, folder, chance)
        else:
            while len(events(folder)) == lines:                                 # until it runs
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 2.0))
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        began = events(folder)[lines]                                           # what this process found
        went_on = began["event"] == "resumed" and began["checkpoint"] == names[-1] if names else (
            began["event"] == "started"
        )
        whole = all(is_whole(folder / "checkpoints" / name) for name in RunFolder(folder).names())
        moment = "during a save" if half_saves(folder) - half else "at another moment"
        survivals[moment].append(went_on and whole)
    steps = int(RunFolder(folder).names()[-1].removeprefix("step_")) + 1
    after = train(config(steps=steps, **SETTINGS), FewDigits(5), folder)
    assert states_equal(after, train(config(steps=steps, **SETTINGS), FewDigits(5), tmp_path / "never killed"))
    assert not list((folder / "checkpoints").glob(".*"))                        # nothing is left behind
    for moment, survived in survivals.items():
        tally(f"1 SIGKILL {moment}", len(survived), sum(survived))
