"""A sharded job ends with the same bytes, in whatever order, by however many processes, however often killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamamba.utils import shards
from lamamba.utils.locks import FileLock
from lamamba.utils.shards import ShardedJob, ShardPlan

TOTAL, SIZE = 11, 3


@dataclass(frozen=True)
class Plan(ShardPlan):
    seed: int = 0

    @property
    def sizes(self):
        return TOTAL, SIZE

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values, where=""):
        return cls(**values)


class Killed(BaseException):
    """Stands for the end of a process in the middle of a shard."""


class Job(ShardedJob):
    """Two files per shard, one of them for the result alone; dies at the shards in `deaths`."""

    version, unfinished, result = 1, ".unfinished", "result.json"
    task, what = "making", "bytes"

    def __init__(self, folder, plan=None, deaths=(), pause=0.0, **options):
        super().__init__(Path(folder), plan or Plan(), **options)
        self.deaths, self.pause, self.made = deaths, pause, []

    def path(self, name):
        return (self.work if name.endswith(".part") else self.folder) / name

    def make_shard(self, number, advance):
        if number in self.deaths:
            raise Killed
        self.made.append(number)
        time.sleep(self.pause)
        indices = self.plan.shard_range(number)
        content = b"".join(hashlib.sha256(f"{self.plan.seed} {k}".encode()).digest() for k in indices)
        advance(len(indices))
        return {f"{number}.bin": content, f"{number}.part": content[::-1]}, {"first": content[0]}

    def finish(self, notes):
        content = b"".join(self.path(f"{number}.part").read_bytes() for number in range(self.plan.num_shards))
        (self.folder / "all.bin").write_bytes(content)
        entry = [len(content), hashlib.sha256(content).hexdigest()]
        return json.dumps({"plan": self.plan.to_dict(), "shards": notes, "all": entry})

    def read_result(self):
        values = json.loads((self.folder / self.result).read_text())
        return Plan.from_dict(values["plan"]), dict(enumerate(values["shards"])), {"all.bin": values["all"]}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module", autouse=True)
def quick():
    before, shards.POLL_SECONDS = shards.POLL_SECONDS, 0.01
    yield
    shards.POLL_SECONDS = before


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "alone"
    Job(folder).run()
    return contents(folder)


def test_the_folder_holds_the_results_alone(expected):
    assert sorted(expected) == ["0.bin", "1.bin", "2.bin", "3.bin", "all.bin", "result.json"]
    note = json.loads(expected["result.json"])["shards"][3]
    content = expected["3.bin"]
    assert note == {
        "version": 1, "first": content[0], "files": {
            "3.bin": [64, hashlib.sha256(content).hexdigest()],
            "3.part": [64, hashlib.sha256(content[::-1]).hexdigest()],
        },
    }


def test_a_job_whose_folder_is_gone_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError, match=r"out/\.unfinished is gone: it was removed, or the current folder"):
        Job("out", report=lambda progress: os.chdir(tmp_path / "elsewhere")).run()
    os.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is gone"):
        Job("out", report=lambda progress: shutil.rmtree("out/.unfinished", ignore_errors=True)).run()


@pytest.mark.parametrize("deaths", [(), (3,)])
def test_a_folder_in_the_place_of_a_file_is_named_before_any_work(tmp_path, deaths):
    with contextlib.suppress(Killed):
        Job(tmp_path, deaths=deaths).run()
    (tmp_path / "1.bin").unlink()
    (tmp_path / "1.bin").mkdir()
    again = Job(tmp_path)
    with pytest.raises(FileExistsError, match="1.bin is a folder where a file of the bytes belongs; move it away"):
        again.run()
    assert not again.made


damages = st.tuples(st.integers(0, 30), st.sampled_from(["flip", "cut", "delete", "empty"]), st.integers(0, 1 << 20))
attempts = st.tuples(st.integers(0, 7), st.sets(st.integers(0, 3)), st.lists(damages, max_size=2))


@settings(max_examples=25, deadline=None)
@given(st.lists(attempts, max_size=5))
def test_any_kills_ranks_and_damage_end_with_the_same_bytes(expected, history):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "out"
        for rank, deaths, damage in history:
            with contextlib.suppress(Killed):
                Job(folder, deaths=deaths, rank=rank).run()
            for number, kind, place_in_file in damage:
                files = sorted(path for path in folder.rglob("*.*") if path.suffix in (".bin", ".part"))
                if files:
                    spoil(files[number % len(files)], kind, place_in_file)
        Job(folder).run()
        assert contents(folder) == expected


def spoil(path, kind, place):
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:-1])
    elif kind == "empty" or not content:
        path.write_bytes(b"")
    else:
        content[place % len(content)] ^= 1 << place % 8
        path.write_bytes(content)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed here")
def test_processes_killed_at_random_moments_end_with_the_same_bytes(tmp_path, expected):
    rng, context, kills = random.Random(0), multiprocessing.get_context("fork"), 0
    while not (tmp_path / "out" / "result.json").is_file():
        processes = [
            context.Process(target=lambda rank=rank: Job(tmp_path / "out", rank=rank, pause=0.1).run())
            for rank in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes[kills // 8 :]:                                 # after eight kills one may live
            process.join(rng.uniform(0.005, 0.08))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        for process in processes:
            process.join()
    Job(tmp_path / "out").run()
    assert kills >= 2
    assert contents(tmp_path / "out") == expected


def test_a_shard_that_another_process_makes_is_waited_for(tmp_path):
    seen = []
    (tmp_path / "out" / ".unfinished").mkdir(parents=True)
    lock = FileLock(tmp_path / "out" / ".unfinished" / "shard_00001.lock")
    assert lock.acquire()

    def report(progress):
        seen.append(progress)
        if progress.note:
            lock.release()                                                      # as the system does when it dies

    job = Job(tmp_path / "out", report=report)
    job.run()
    assert job.made == [0, 2, 3, 1]
    assert "waiting for other processes" in {progress.note for progress in seen}


def test_progress_counts_images_and_what_was_there_before(tmp_path):
    with pytest.raises(Killed):
        Job(tmp_path / "out", deaths={2}).run()
    seen = []
    Job(tmp_path / "out", report=seen.append).run()
    making = [(p.done, p.total, p.resumed) for p in seen if p.task == "making"]
    assert making[0] == (6, 11, 6)
    assert making[-1] == (11, 11, 6)
    assert [p.done for p in seen if p.task == "verifying"] == [3, 6, 9, 11]


def test_ranks_begin_at_different_shards(tmp_path):
    job = Job(tmp_path / "out", rank=6)
    job.run()
    assert job.made == [2, 3, 0, 1]


def test_another_plan_and_foreign_files_are_refused(tmp_path):
    Job(tmp_path / "done").run()
    with pytest.raises(Killed):
        Job(tmp_path / "begun", deaths={1}).run()
    for name in ("done", "begun"):
        with pytest.raises(ValueError, match=r"holds bytes made otherwise \(seed: 0 there, 1 here\)"):
            Job(tmp_path / name, Plan(seed=1)).run()
    with pytest.raises(FileExistsError, match=r"holds something else \(begun, done\)"):
        Job(tmp_path).run()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; nothing was done"):
        Job(tmp_path / "file").run()


def test_a_disk_that_spoils_what_is_written_is_called_broken(tmp_path):
    class Spoiled(Job):
        def make_note(self, files, more):
            spoil(self.folder / next(iter(files)), "flip", 5)
            return super().make_note(files, more)

    with pytest.raises(OSError, match="damaged 3 times as soon as they were written"):
        Spoiled(tmp_path / "out").run()
