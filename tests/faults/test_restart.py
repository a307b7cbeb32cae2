"""N + N steps are 2 N steps to the bit, by the hashes of all that the last checkpoints hold; signals lose nothing."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress

import pytest

from lamamba.runs.folder import RunFolder
from lamamba.training.interrupt import EXIT_INTERRUPTED, Interrupted
from lamamba.training.loop import train
from tests.training.together import Failed, FewDigits, config, pytestmark, read_lines, start, together  # noqa: F401

KINDS = {
    "plain, in the middle of an epoch": dict(images=7),
    "across an epoch's edge": dict(images=4),
    "accumulation": dict(batch_size=5, processes=dict(accumulation_steps=3)),
    "noise, two averages": dict(model=dict(objective="noise"), ema_decays=(0.5, 0.9)),
    "v, cosine, min-snr": dict(
        model=dict(objective="v"), optimizer=dict(schedule="cosine", warmup_steps=2), loss=dict(weighting="min-snr")),
    "bfloat16, activations made again": dict(
        precision=dict(autocast="bfloat16"), processes=dict(checkpoint_activations=True)),
    "held-out images": dict(watch=dict(held_out=2, held_out_every=2)),
    "two workers": dict(processes=dict(data_workers=2)),
    "two processes": dict(count=2, batch_size=5, processes=dict(accumulation_steps=2)),
    "split between two processes": dict(count=2, batch_size=5, processes=dict(sharding="full", accumulation_steps=2)),
}
FEW = ("plain, in the middle of an epoch", "two workers", "two processes")


def steps_of(folder, settings, images, stop_at=None):
    """Train; with stop_at, ask for a stop during that step, in the middle of its pieces where this process reads."""
    digits = FewDigits(images)
    if settings.processes.data_workers and sys.platform == "linux":             # a fork server would import all again
        multiprocessing.set_start_method("fork", force=True)
    if stop_at is not None and not settings.processes.data_workers:
        read, reads = digits.read, []

        def read_and_signal(indices):
            reads.append(indices)
            if len(reads) == (stop_at - 1) * settings.processes.accumulation_steps + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return read(indices)

        digits.read = read_and_signal

    def watch(step_state):
        if settings.processes.data_workers and step_state.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        return train(settings, digits, folder, [watch]).step, digits.seen
    except Interrupted as stop:
        return stop.step, digits.seen


def hashes(folder):
    """Of every file of the newest checkpoint: weights, averages, optimizer, random state, counts.

    Tensors are hashed by name: the headers of torch's split files come in any order.
    """
    from safetensors.numpy import load_file

    checkpoint, found = RunFolder(folder).newest(), {}
    for name, digest in json.loads((checkpoint / "manifest.json").read_text())["files"].items():
        if name.endswith(".safetensors"):
            tensors = load_file(checkpoint / name)
            digest = {key: hashlib.sha256(tensors[key].tobytes()).hexdigest() for key in tensors}
        found[name] = digest
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_n_and_n_steps_are_two_n_steps_to_the_bit(kind, tmp_path, count, tally):
    if kind not in count(FEW, KINDS):
        pytest.skip("in make faults")
    options = {"images": 7, "count": 1, **KINDS[kind]}
    images, processes = options.pop("images"), options.pop("count")
    settings = config(steps=6, checkpoint_every=3, **options)

    def go(*arguments):
        return together(processes, steps_of, *arguments)

    whole = go(tmp_path / "whole", settings, images)
    if count(False, True):                                                      # so that equality means something
        go(tmp_path / "again", settings, images)
        assert hashes(tmp_path / "whole") == hashes(tmp_path / "again")
    first = go(tmp_path / "parts", settings, images, 3)
    second = go(tmp_path / "parts", settings, images)
    assert [step for step, _ in (*whole, *first, *second)] == [6] * processes + [3] * processes + [6] * processes
    if not settings.processes.data_workers:                                     # what workers read, they keep
        assert [a + b for (_, a), (_, b) in zip(first, second, strict=True)] == [seen for _, seen in whole]
    same = hashes(tmp_path / "whole") == hashes(tmp_path / "parts")
    assert len(hashes(tmp_path / "whole")) >= 6
    tally("4 N + N = 2 N steps to the bit", 1, int(same))


def until_stopped(folder):
    """As the command line does: train for ever, and end with the status."""
    try:
        train(config(steps=10**6), FewDigits(7), folder)
    except Interrupted:
        raise SystemExit(EXIT_INTERRUPTED) from None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_at_any_moment_ends_with_a_checkpoint_and_a_status(name, tmp_path, count, tally):
    chance, trials, survived = random.Random(name), count(2, 20), 0
    for trial in range(trials):
        folder = tmp_path / f"run{trial}"
        process, results = start(until_stopped, folder)
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(process.pid, getattr(signal, name))
        wait = time.monotonic() + 30
        with suppress(ProcessLookupError):                                      # it has just ended
            while trial % 2 == 0 and time.monotonic() < wait and process.is_alive():
                os.kill(process.pid, chance.choice([signal.SIGTERM, signal.SIGUSR1]))   # again, during the save
                time.sleep(0.001)
        _, is_well, (kind, text, _) = results.get(timeout=60)
        process.join()
        events, done = read_lines(folder, "events.jsonl"), int(read_lines(folder)[-1]["step"])
        checkpoint = RunFolder(folder).newest()
        survived += (
            not is_well and kind is SystemExit and text == str(EXIT_INTERRUPTED)
            and events[-1]["event"] == "stopped" and events[-1]["step"] == done
            and checkpoint.name == f"step_{done:08d}"
            and not list((folder / "checkpoints").glob(".*"))
        )
    tally(f"7 {name}, half of them with further signals", trials, survived)


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path, tally):
    answers = together(2, signal_one, tmp_path / "run")
    assert answers == [3, 3]
    assert RunFolder(tmp_path / "run").newest().name == "step_00000003"
    tally("7 signal to one of two processes", 1, 1)


def signal_one(folder):
    def watch(step_state):
        if step_state.step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)

    try:
        train(config(steps=10**6, checkpoint_every=10**6), FewDigits(7), folder, [watch])
    except Interrupted as stop:
        return stop.step


def test_a_killed_data_worker_is_an_error_and_no_hang(tmp_path, count, tally):
    survived = 0
    for trial in range(trials := count(1, 10)):
        began = time.monotonic()
        (answer,) = together(1, with_killed_worker, tmp_path / f"run{trial}")
        survived += (
            isinstance(answer, Failed) and answer.args[0] is RuntimeError
            and "a process that reads data has died" in answer.args[1] and time.monotonic() - began < 200
        )
    tally("8 data worker killed", trials, survived)


def with_killed_worker(folder):
    import psutil

    def watch(step_state):
        if step_state.step == 3:
            child = random.Random(str(folder)).choice(psutil.Process().children())
            child.send_signal(signal.SIGKILL)

    train(config(steps=10**6, checkpoint_every=10**6, processes=dict(data_workers=2)), FewDigits(7), folder, [watch])


def test_a_second_job_in_a_folder_is_refused_and_a_dead_one_does_not_block(tmp_path, count, tally):
    folder, refused, freed = tmp_path / "run", 0, 0
    for _ in range(trials := count(1, 10)):
        process, _ = start(until_stopped, folder)
        before = count_events(folder)
        while count_events(folder) == before:
            time.sleep(0.002)
        with pytest.raises(BlockingIOError, match=f"another job trains in .*process {process.pid} on "):
            train(config(steps=10**6), FewDigits(7), folder)
        refused += 1
        os.kill(process.pid, signal.SIGKILL)                                    # its lock goes with it
        process.join()
        step = int(RunFolder(folder).names()[-1].removeprefix("step_")) if RunFolder(folder).names() else 0
        freed += train(config(steps=step + 1), FewDigits(7), folder).step == step + 1
    tally("8 second job in a folder refused", trials, refused)
    tally("8 lock of a killed job", trials, freed)


def count_events(folder):
    path = folder / "events.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_configuration_that_does_not_fit_the_checkpoint_is_refused_with_the_difference(tmp_path, tally):
    train(config(steps=2), FewDigits(7), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes = {
        "train.seed: 0 there, 1 here": dict(seed=1),
        "train.batch_size: 4 there, 2 here; train.seed: 0 there, 3 here": dict(batch_size=2, seed=3),
        r"train.ema_decays: \[0.5\] there, \[0.9\] here": dict(ema_decays=(0.9,)),
        "train.precision.autocast: 'none' there, 'bfloat16' here": dict(precision=dict(autocast="bfloat16")),
        "architecture.width: 8 there, 16 here": dict(model=dict(width=16)),
        "train.loss.weighting: 'none' there": dict(model=dict(objective="v"), loss=dict(weighting="min-snr")),
    }
    for said, change in changes.items():
        with pytest.raises(ValueError, match=said):
            train(config(**change), FewDigits(7), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tally("8 configuration that does not fit", len(changes), len(changes))
