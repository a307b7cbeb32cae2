"""The folder of a run: only what training has written counts as a checkpoint, and what was just saved stays."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from lamamba.runs.folder import RunFolder
from lamamba.runs.model import model_folder
from lamamba.training.loop import train
from lamamba.utils.distributed import ProcessGroup
from lamamba.utils.files import write_json
from tests.training.together import FewDigits, config

NEWEST = "step_00000004"


def save(run, step, keep=2):
    return run.save(step, lambda folder: write_json(folder / "state.json", {"step": step}),
                    ProcessGroup(0, 1, torch.device("cpu")), keep=keep)


@pytest.fixture
def run(tmp_path):
    """With checkpoints of steps 2 and 4, which hold their step alone."""
    run = RunFolder(tmp_path)
    for step in (2, 4):
        save(run, step)
    return run


def link(path):
    path.symlink_to(NEWEST, target_is_directory=True)


def file(path):
    path.write_bytes(b"")


def copy(path):
    shutil.copytree(path.with_name(NEWEST), path)


@pytest.mark.parametrize(("make", "name"), [
    *((copy, name) for name in (
        "step_best", "step_99999999", "step_00000005", "step_00000006", "step_00000004_backup", "step_4", "step_",
        "step_000000004", "step_0000000\N{SUPERSCRIPT TWO}", "step_-0000001", "step_1e8", "step_00000004 (copy)",
        ".my_step_backup", ".tmp_step_best",
    )),
    (link, "step_99999999"), (link, "step_latest"), (link, "step_00000006"), (file, "step_00000006"),
    (file, "._step_00000004"),
])
def test_a_stranger_beside_the_checkpoints_is_neither_read_nor_removed(run, make, name):
    make(run.checkpoints / name)
    assert run.names() == ["step_00000002", NEWEST]
    assert run.unknown_checkpoints() == ([name] if name.startswith("step_") else [])
    assert model_folder(run.path).name == NEWEST
    for step in (5, 6):
        assert save(run, step) == run.newest() == run.checkpoint(step)
    assert run.names() == ["step_00000005", "step_00000006"]
    is_moved = name in run.names()                                              # it lay where a checkpoint belongs
    assert os.path.lexists(run.checkpoints / (f"damaged_{name}" if is_moved else name))


def test_training_names_what_it_has_not_written(tmp_path, caplog):
    train(config(), FewDigits(5), tmp_path)
    for name in ("step_best", "step_99999999"):
        copy(tmp_path / "checkpoints" / name)
    caplog.clear()
    assert train(config(steps=6), FewDigits(5), tmp_path).step == 6
    assert RunFolder(tmp_path).names() == [NEWEST, "step_00000006"]
    assert "step_99999999, step_best were not written by this run; training neither reads nor removes" in caplog.text


@pytest.mark.parametrize("steps", [(99_999_998, 100_000_000), (8, 4)])
def test_checkpoints_are_in_the_order_of_their_steps_and_the_last_one_saved_stays(run, steps):
    for step in steps:
        saved = save(run, step, keep=1)
        assert saved.is_dir()
    assert run.names()[-1] == f"step_{max(steps):08d}"
