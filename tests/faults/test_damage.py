"""Bits flipped, files cut off or gone, disks full: the damage is named and the checkpoint before is used."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil

import pytest

from lamamba.runs.folder import RunFolder
from lamamba.runs.model import open_network
from lamamba.training.loop import train
from tests.files import Bomb, damage, full_disk, write_manifest
from tests.training.together import FewDigits, config, pytestmark, states_equal, together  # noqa: F401

SPLIT = dict(sharding="full")


def run(settings, folder, limit=None, limited=None):
    """Train; from step 1 on, process `limited` may not write files of more than `limit` bytes, until step 2 is done."""
    with contextlib.ExitStack() as stack:
        def watch(step_state):
            if limited is not None and step_state.step == 1 and os.environ.get("RANK", "0") == str(limited):
                stack.enter_context(full_disk(limit))
            if step_state.step == 2:
                stack.close()

        return train(settings, FewDigits(5), folder, [watch]).step


@pytest.fixture(scope="module", params=["whole", "split"])
def finished(request, tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, by one process or split between two."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    if request.param == "whole":
        run(config(), folder)
    else:
        assert together(2, run, config(processes=SPLIT), folder) == [4, 4]
    return folder


@pytest.mark.parametrize("kind", ["bit", "cut", "missing"])
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(finished, tmp_path, kind, count, tally, caplog):
    chance, tried, survived = random.Random(0), 0, 0
    files = sorted(p.relative_to(finished) for p in (finished / "checkpoints/step_00000004").rglob("*") if p.is_file())
    assert len(files) >= 7
    for file in files * (1 if kind == "missing" else count(1, 12)):
        folder = tmp_path / f"run{tried}"
        shutil.copytree(finished, folder)
        damage(folder / file, kind, chance)
        caplog.clear()
        checkpoint = RunFolder(folder).newest_whole()
        tried += 1
        survived += checkpoint.name == "step_00000002" and file.name.split(".")[0] in caplog.text
        shutil.rmtree(folder)
    tally({"bit": "2 bit flipped", "cut": "2 file truncated", "missing": "2 file missing"}[kind], tried, survived)


def test_a_disk_full_at_any_byte_leaves_the_old_checkpoint_and_training_goes_on(tmp_path, count, tally, caplog):
    expected, survived = train(config(), FewDigits(5), tmp_path / "never full"), 0
    files = [path.stat().st_size for path in (tmp_path / "never full" / "checkpoints").rglob("*") if path.is_file()]
    limits = [random.Random(k).randrange(max(files)) for k in range(count(3, 25))]
    for number, limit in enumerate([*limits, 0]):
        folder = tmp_path / f"run{number}"
        caplog.clear()
        with contextlib.ExitStack() as stack:
            def watch(step_state, limit=limit, stack=stack, folder=folder):
                if step_state.step == 1:
                    stack.enter_context(full_disk(limit))
                if step_state.step == 2:
                    stack.close()
                    assert [path.name for path in (folder / "checkpoints").iterdir()] == []

            state = train(config(), FewDigits(5), folder, [watch])
        said = "step 2 could not be written" in caplog.text and "Training goes on" in caplog.text
        survived += said and states_equal(state, expected) and RunFolder(folder).names() == ["step_00000004"]
    tally("3 disk full during a save", len(limits) + 1, survived)


def test_a_disk_full_for_one_of_two_processes(tmp_path, tally):
    """The split network's process 1 cannot write its part: neither process takes the checkpoint for whole."""
    assert together(2, run, config(processes=SPLIT), tmp_path / "run", 1000, 1) == [4, 4]
    assert RunFolder(tmp_path / "run").names() == ["step_00000004"]
    text = (tmp_path / "run" / "events.jsonl").read_text()
    assert "not saved" in text
    assert "step 2 could not be written" in text
    tally("3 disk full on one of two processes", 1, 1)


@pytest.mark.parametrize("file", [
    "model/diffusion_pytorch_model.safetensors", "model/diffusion_pytorch_model.bin", "ema/diffusion_pytorch_model.bin",
    "optimizer.safetensors", "shards/.metadata", "official.pt",
])
def test_a_pickle_with_code_in_it_is_not_executed(tmp_path, file, tally):
    """Offered as a checkpoint's file with a manifest that lists it, or as what to start from."""
    folder, sign = tmp_path / "run", tmp_path / "executed"
    run(config(), folder)
    evil = pickle.dumps(Bomb(sign))
    if file == "official.pt":
        (tmp_path / file).write_bytes(evil)
        with pytest.raises(ValueError, match="nothing from a checkpoint is executed"):
            train(config(start=dict(source=str(tmp_path / file))), FewDigits(5), tmp_path / "other")
    else:
        checkpoint = folder / "checkpoints" / "step_00000004"
        (checkpoint / file).parent.mkdir(exist_ok=True)
        (checkpoint / file).write_bytes(evil)
        if file.endswith(".bin"):
            (checkpoint / file).with_suffix(".safetensors").unlink()
        write_manifest(checkpoint)
        with pytest.raises((ValueError, OSError)):
            run(config(steps=6), folder)
        if "ema" in file:
            with pytest.raises(ValueError, match="missing or damaged|a pickle can run code"):
                open_network(folder)
    assert not sign.exists()
    tally("9 pickle offered as a checkpoint", 1, 1)
