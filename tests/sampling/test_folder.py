"""Many images on disk: what is in the folder, what kills, damage and full disks do."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lamamba.sampling.folder import sample_many
from lamamba.sampling.plan import Plan, find_plan
from lamamba.sampling.settings import Settings, read_image_metadata
from lamamba.utils import shards
from tests.files import full_disk, hashes

SETTINGS = Settings(model="runs/x", model_sha256="abc", sampler="ddim", steps=5, height=6, width=4)
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed here")


def make_plan(**changes) -> Plan:
    values = dict(settings=SETTINGS, num=22, seed=100, rule="random", classes=(0, 3, 7), files="both", batch_size=4)
    return Plan(**{**values, **changes})


def maker(plan, pause=0.0):
    """Stands for a network: the pixels of image k are a function of its seed and label alone."""

    def make_images(places, tell):
        tell(0.5)
        time.sleep(pause)
        labels = plan.labels_of(places) or [0] * len(places)
        return np.stack([
            np.random.default_rng([plan.seed_of(k), label]).integers(0, 256, plan.shape).astype(np.uint8)
            for k, label in zip(places, labels, strict=True)
        ])

    return make_images


def run(plan, folder, pause=0.0, **options):
    return sample_many(plan, folder, maker(plan, pause), **options)


def start(plan, folder, pause=0.02, rank=0):
    process = multiprocessing.get_context("fork").Process(target=run, args=(plan, folder, pause), kwargs={"rank": rank})
    process.start()
    return process


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "alone"
    run(make_plan(), folder, machine={"device": "test"})
    return folder


def test_what_is_in_the_folder(alone):
    plan = make_plan()
    assert sorted(path.name for path in alone.iterdir()) == [
        *(f"{k:06d}.png" for k in range(22)), "manifest.json", "samples.npz", "shards.json",
    ]
    expected, labels = maker(plan)(range(22), lambda share: None), plan.labels_of(range(22))
    with np.load(alone / "samples.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], expected)
        assert file["arr_1"].tolist() == labels
    np.testing.assert_array_equal(np.asarray(Image.open(alone / "000021.png")), expected[21])
    facts = read_image_metadata(alone / "000021.png")
    assert (facts.settings, facts.seeds, facts.labels, facts.columns) == (SETTINGS, (121,), (labels[21],), 0)
    manifest = json.loads((alone / "manifest.json").read_text())
    assert Plan.from_dict(manifest["plan"]) == plan == find_plan(alone)
    assert manifest["machines"] == [{"device": "test", "images": 22}]


def test_labels_are_a_function_of_the_seed():
    plan = make_plan(num=3000, batch_size=64)
    labels = plan.labels_of(range(3000))
    assert make_plan(num=3000, seed=1100).labels_of(range(2000)) == labels[1000:]
    assert make_plan(rule="balanced").labels_of(range(5)) == [0, 3, 7, 0, 3]
    assert make_plan(rule="none", classes=()).labels_of(range(5)) is None


def test_a_finished_folder_is_verified_and_nothing_is_made(alone):
    def never(places, tell):
        raise AssertionError

    seen = []
    before = {path: path.stat().st_mtime_ns for path in alone.iterdir()}
    sample_many(make_plan(), alone, never, report=seen.append)
    assert {p.task for p in seen} == {"verifying"}
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (22, 22, "images")
    assert {path: path.stat().st_mtime_ns for path in alone.iterdir()} == before


def test_grey_images_and_no_labels(tmp_path):
    plan = make_plan(rule="none", classes=(), channels=1, files="npz", num=5)
    run(plan, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "samples.npz", "shards.json"]
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"][..., :1], maker(plan)(range(5), lambda share: None))
        np.testing.assert_array_equal(file["arr_0"][..., 0], file["arr_0"][..., 2])


@needs_fork
@pytest.mark.parametrize("files", ["both", "npz"])
def test_killed_at_random_moments_and_started_again(tmp_path, alone, files):
    rng, plan, out, kills = random.Random(3), make_plan(files=files, num=80), tmp_path / "out", 0
    run(plan, tmp_path / "uninterrupted")
    for _ in range(60):
        process = start(plan, out)
        process.join(rng.uniform(0.005, 0.15))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
    run(plan, out)
    assert kills >= 2
    assert hashes(out) == hashes(tmp_path / "uninterrupted")


@needs_fork
def test_processes_share_the_work_and_outlive_one_of_them(tmp_path):
    plan, out = make_plan(num=80), tmp_path / "out"
    run(plan, tmp_path / "alone")
    processes = [start(plan, out, rank=rank) for rank in range(3)]
    while len(list(out.glob(".sampling/shard_*.json"))) < 4:
        time.sleep(0.005)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    assert hashes(out) == hashes(tmp_path / "alone")


@pytest.mark.parametrize("damage", [
    ("000005.png", b"short"), ("000005.png", None), ("samples.npz", b"short"), ("shards.json", b"{"),
])
def test_damaged_files_are_made_anew_and_the_others_stay(tmp_path, alone, damage, caplog):
    out, (name, content), made = tmp_path / "out", damage, []
    run(make_plan(), out, machine={"device": "test"})
    others = {path: path.stat().st_mtime_ns for path in out.glob("*.png") if not 4 <= int(path.stem) < 8}
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)

    def make_images(places, tell):
        made.append(places)
        return maker(make_plan())(places, tell)

    sample_many(make_plan(), out, make_images, machine={"device": "test"})
    assert hashes(out) == hashes(alone)
    if name != "shards.json":
        assert made == ([range(4, 8)] if name.endswith("png") else [])
        assert {path: path.stat().st_mtime_ns for path in others} == others
        assert "made anew" in caplog.text


def test_a_shard_that_is_cut_short_before_the_end_is_found_by_its_hash(tmp_path, alone):
    out, plan, times = tmp_path / "out", make_plan(), 0

    def make_images(places, tell):
        nonlocal times
        times += 1
        if places.start == 20 and times == plan.num_shards:                     # of the same size, but not the same
            data = bytearray((out / "000002.png").read_bytes())
            data[-20] ^= 1
            (out / "000002.png").write_bytes(data)
        return maker(plan)(places, tell)

    sample_many(plan, out, make_images, machine={"device": "test"})
    assert times == plan.num_shards + 1
    assert hashes(out) == hashes(alone)


@needs_fork
def test_a_full_disk_is_named_loses_nothing_and_is_no_end(tmp_path, alone):
    out, said = tmp_path / "out", r"takes no more .*: 22 of 22 images are finished and stay; make room and"
    with full_disk(1500), pytest.raises(OSError, match=said):                   # PNGs fit, samples.npz does not
        run(make_plan(), out, machine={"device": "test"})
    assert not list(out.glob("**/*.tmp"))
    assert not (out / "samples.npz").exists()
    run(make_plan(), out, machine={"device": "test"})
    assert hashes(out) == hashes(alone)


def test_other_settings_are_refused_with_the_differences(tmp_path, alone):
    other = dataclasses.replace(SETTINGS, steps=6, model="elsewhere")
    with pytest.raises(ValueError, match=r"\(steps: 5 there, 6 here\); repeat the options"):
        run(make_plan(settings=other), alone)
    with pytest.raises(ValueError, match=r"made otherwise \(seed: 100 there, 0 here; batch_size: 4 there, 8 here\)"):
        run(make_plan(seed=0, batch_size=8), alone)
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text('{"name": "site"}')
    with pytest.raises(FileExistsError, match="manifest.json is of something else than a folder of samples"):
        find_plan(tmp_path / "site")
    with pytest.raises(FileExistsError, match="holds something else"):
        run(make_plan(), tmp_path)
    with pytest.raises(ValueError, match="largest seed"):
        make_plan(seed=2**63 - 5)
