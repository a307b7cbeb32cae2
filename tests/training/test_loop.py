"""The training loop: losses fall, checkpoints are whole, resumed runs equal to the bit, bad steps update nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lamamba import LaMambaUNet
from lamamba.data.digits import Digits
from lamamba.data.images import Images, read_bad_files
from lamamba.data.sources import FolderSource
from lamamba.options.training import DataOptions, TrainConfig, WatchOptions
from lamamba.runs.folder import RunFolder
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import open_network
from lamamba.training.checkpoint import update_ema
from lamamba.training.loop import train
from lamamba.training.sources import open_data
from tests.data.test_images import write_images
from tests.files import full_disk
from tests.training.together import TINY, FewDigits, config, read_lines, states_equal


@pytest.mark.parametrize("objective", ["flow", "noise", "v"])
def test_learns_a_few_images(tmp_path, objective):
    losses = []
    model = dataclasses.replace(TINY, width=16, objective=objective)
    settings = config(model=model, steps=40, batch_size=16, checkpoint_every=40)
    train(settings, FewDigits(4), tmp_path, [lambda step_state: losses.append(step_state.loss)])
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def test_the_time_of_callbacks_does_not_count_for_the_speed(tmp_path, monkeypatch):
    """With a clock that advances by 2 s for each batch that is read and 100 s in a callback."""
    now = [0.0]
    monkeypatch.setattr("lamamba.training.loop.time", SimpleNamespace(perf_counter=lambda: now[0]))
    digits, rates = FewDigits(8), []
    read = digits.read

    def slow_read(indices):
        now[0] += 2
        return read(indices)

    def slow_callback(step_state):
        rates.append((step_state.images_per_second, step_state.seconds))
        now[0] += 100

    digits.read = slow_read
    train(config(), digits, tmp_path, [slow_callback])
    assert [line["images_per_second"] for line in read_lines(tmp_path)] == [2, 2, 2, 2]
    assert rates == [(2, 2), (2, 104), (2, 206), (2, 308)]


@pytest.mark.parametrize("objective", ["flow", "noise"])
def test_a_restart_changes_nothing_to_the_bit(tmp_path, objective):
    """5 images in batches of 4: the restart falls into the middle of an epoch."""
    model = dataclasses.replace(TINY, objective=objective)
    whole = train(config(model=model, steps=4), FewDigits(5), tmp_path / "whole")
    train(config(model=model, steps=2), FewDigits(5), tmp_path / "parts")
    parts = train(config(model=model, steps=4), FewDigits(5), tmp_path / "parts")
    assert states_equal(whole, parts)
    one, other = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_lines(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert one == other


def test_a_run_killed_between_checkpoints_repeats_its_steps(tmp_path):
    class Killed(Exception):
        pass

    def kill(step_state):
        if step_state.step == 3:
            raise Killed

    whole = train(config(), FewDigits(5), tmp_path / "whole")
    with pytest.raises(Killed):
        train(config(), FewDigits(5), tmp_path / "killed", [kill])
    assert RunFolder(tmp_path / "killed").names() == ["step_00000002"]
    assert states_equal(whole, train(config(), FewDigits(5), tmp_path / "killed"))
    assert [line["step"] for line in read_lines(tmp_path / "killed")] == [1, 2, 3, 4]


def test_what_a_run_leaves_behind(tmp_path):
    state = train(config(), Digits(), tmp_path)
    run = json.loads((tmp_path / "config.json").read_text())
    assert run["train"] == config().to_dict()
    assert run["architecture"] == state.model.architecture.to_dict()
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    assert {path.name for path in checkpoint.iterdir()} == {
        "model", "ema", "optimizer.safetensors", "sampling.json", "state.json", "manifest.json",
    }
    model, metadata = open_network(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), state.ema.parameters(), strict=True))
    assert metadata == ModelMetadata(objective="flow", image_size=8, label_names=tuple("0123456789"), guidance=None)
    assert LaMambaUNet.from_pretrained(checkpoint / "model").architecture == state.model.architecture


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(config(steps=5, checkpoint_every=1, keep_checkpoints=2), FewDigits(4), tmp_path)
    assert RunFolder(tmp_path).names() == ["step_00000004", "step_00000005"]


def test_the_average_is_an_exponential_one():
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * ema.weight + 0.1 * model.weight
    update_ema(ema, model, 0.9)
    torch.testing.assert_close(ema.weight, expected)


def test_a_run_without_a_checkpoint_may_start_again_with_other_options(tmp_path):
    """As after a batch that was too large for the device."""
    with pytest.raises(ValueError, match="held_out=4 leaves nothing"):
        train(config(watch=WatchOptions(held_out=4)), FewDigits(4), tmp_path)
    RunFolder(tmp_path).bad_images.write_text("other.png\tempty: 0 bytes\n")
    assert train(config(seed=3), FewDigits(4), tmp_path).step == 4
    assert not RunFolder(tmp_path).bad_images.exists()
    assert json.loads(RunFolder(tmp_path).config.read_text())["train"]["seed"] == 3


def test_images_deleted_during_a_run_stop_neither_it_nor_its_restart(tmp_path):
    """Those that were seen and those that were not; added ones are refused, as they would change the order."""
    write_images(tmp_path / "set" / "a", 4)
    write_images(tmp_path / "set" / "b", 4)
    settings = config(data=dict(source=str(tmp_path / "set"), image_size=8, channels=1), steps=4)

    def delete(state):
        if state.step == 2:
            (tmp_path / "set" / "a" / "001.png").unlink()
            shutil.rmtree(tmp_path / "set" / "b")

    run = tmp_path / "run"
    train(settings, open_data(settings, run), run, [delete])
    longer = dataclasses.replace(settings, steps=8)
    assert train(longer, open_data(longer, run), run).step == 8
    assert read_bad_files(RunFolder(run).bad_images).keys() <= {"a/001.png", *(f"b/00{k}.png" for k in range(4))}
    (tmp_path / "set" / "a" / "new.png").write_bytes((tmp_path / "set" / "a" / "000.png").read_bytes())
    with pytest.raises(ValueError, match="began with other data"):
        train(longer, open_data(longer, run), run)
    (run / "data_files.txt.gz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"data_files.txt.gz is damaged"):
        open_data(longer, run)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(NotADirectoryError, match=r"thesis\.tex is a file; nothing was done"):
        train(config(), FewDigits(4), tmp_path / "thesis.tex")
    with pytest.raises(FileExistsError, match="holds no run"):
        train(config(), FewDigits(4), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(config(), FewDigits(4), folder)


@pytest.mark.parametrize("file", [
    "ema/diffusion_pytorch_model.safetensors", "model/diffusion_pytorch_model.safetensors", "optimizer.safetensors",
    "state.json", "sampling.json", "ema/config.json", "manifest.json",
])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path, file, damage, caplog):
    finished, finished_state = finished
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "checkpoints" / "step_00000004" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    with pytest.raises(ValueError, match=path.name.split(".")[0]):
        open_network(folder)
    state = train(config(steps=4), FewDigits(4), folder)
    (warning,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert path.name.split(".")[0] in warning
    assert "Going on from step_00000002" in warning
    assert states_equal(state, finished_state)
    assert (folder / "checkpoints" / "damaged_step_00000004").is_dir()
    assert open_network(folder)


def test_a_run_without_a_whole_checkpoint_is_not_started_afresh(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    for path in folder.glob("checkpoints/*/state.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole: .*state.json.*state.json"):
        train(config(steps=6), FewDigits(4), folder)


def test_an_unfinished_save_is_not_mistaken_for_a_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.copytree(folder / "checkpoints" / "step_00000004", folder / "checkpoints" / ".tmp_step_00000005")
    assert RunFolder(folder).newest().name == "step_00000004"


def test_a_checkpoint_of_a_newer_format_is_refused(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    path = folder / "checkpoints" / "step_00000004" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 9'))
    with pytest.raises(ValueError, match="format version 9"):
        open_network(folder)


def test_runs_of_the_first_version_are_resumed_and_sampled(tmp_path):
    """version1/run was made by lamamba 0.1.0 before there were several processes."""
    folder = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "version1" / "run", folder)
    model, metadata = open_network(folder)
    assert (model.architecture.width, metadata.label_names[:2]) == (4, ("0", "1"))
    run = json.loads((folder / "config.json").read_text())
    settings = dataclasses.replace(TrainConfig.from_dict(run["train"]), steps=3)
    state = train(settings, FewDigits(5), folder)
    assert (state.step, state.optimizer.state[next(state.model.parameters())]["step"].item()) == (3, 3)
    assert [line["step"] for line in read_lines(folder)] == [1, 2, 3]


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    with full_disk(20_000), pytest.raises(OSError, match=r"step 6 could not be written .*too large.*step_00000004"):
        train(config(steps=6), FewDigits(4), folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_00000002", "step_00000004"}
    assert RunFolder(folder).newest().name == "step_00000004"
    assert train(config(steps=6), FewDigits(4), folder).step == 6


def test_a_folder_of_pictures_trains_with_and_without_classes(tmp_path):
    for name in ("ant", "bee"):
        write_images(tmp_path / "images" / name, 3)
    data = DataOptions(source=str(tmp_path / "images"), image_size=16, channels=3, mirror=True)
    images = Images(FolderSource(tmp_path / "images"), 16)
    state = train(config(data=data, steps=2), images, tmp_path / "run")
    assert (state.model.architecture.num_classes, state.model.architecture.in_channels) == (2, 3)
    data = dataclasses.replace(data, use_labels=False)
    state = train(config(data=data, steps=2), images, tmp_path / "unconditional")
    assert state.model.architecture.num_classes == 0


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="device 'cuda:7' cannot be used here"):
        train(config(device="cuda:7"), FewDigits(4), tmp_path)
    assert not any(tmp_path.iterdir())
