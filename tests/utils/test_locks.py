"""Locks die with the process that holds them, refuse everybody else, and survive refusals, deletions and forks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from lamamba.utils.locks import FileLock, FolderLock

HOLD = """
import sys, pathlib
from lamamba.utils.locks import FileLock, FolderLock
lock = getattr(sys.modules["lamamba.utils.locks"], sys.argv[1])(pathlib.Path(sys.argv[2]))
print("refused" if lock.acquire() is False else "held", flush=True)
sys.stdin.read()
"""


def start(kind, path):
    """A process that locks a path and says so, until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    return process, process.stdout.readline().strip()


def answer(kind, path):
    """What another process is told that tries to lock: "held", "refused", or the last line of its error."""
    process, line = start(kind, path)
    _, error = process.communicate()
    return line or error.strip().splitlines()[-1]


@pytest.fixture
def folder(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    yield tmp_path
    lock.release()


def test_one_process_holds_a_file_until_it_releases_it(tmp_path):
    lock = FileLock(tmp_path / "a.lock")
    assert lock.acquire()
    assert answer("FileLock", lock.path) == "refused"
    lock.release()
    lock.release()
    assert answer("FileLock", lock.path) == "held"
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "gone" / "a.lock").acquire()


@pytest.mark.parametrize("kind", ["FileLock", "FolderLock"])
def test_a_killed_process_holds_nothing(tmp_path, kind):
    path = tmp_path / "a.lock" if kind == "FileLock" else tmp_path
    process, line = start(kind, path)
    assert line == "held"
    assert answer(kind, path) != "held"
    process.kill()
    process.communicate()
    assert answer(kind, path) == "held"


def test_a_refusal_names_the_holder(folder):
    said = f"another job trains in {folder} (process {os.getpid()} on"
    assert said in answer("FolderLock", folder)


def test_a_second_lock_in_this_process_is_refused_and_does_not_free_the_first(folder):
    for _ in range(2):                                                          # closing any descriptor would free it
        with pytest.raises(BlockingIOError, match=re.escape(f"another job trains in {folder} (this process)")):
            FolderLock(folder).acquire()
        assert "another job trains" in answer("FolderLock", folder)
        assert not FileLock(folder / ".lock").acquire()
        assert answer("FileLock", folder / ".lock") == "refused"


def test_another_name_of_the_file_is_refused_and_does_not_free_the_first(tmp_path):
    lock, link = FileLock(tmp_path / "a.lock"), tmp_path / "b.lock"
    assert lock.acquire()
    os.link(lock.path, link)
    assert not FileLock(link).acquire()
    assert answer("FileLock", lock.path) == "refused"
    lock.release()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted there")
def test_a_deleted_lock_file_lets_no_second_job_in(folder):
    (folder / ".lock").unlink()
    assert "another job trains" in answer("FolderLock", folder)
    with pytest.raises(BlockingIOError, match="this process"):
        FolderLock(folder).acquire()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted there")
def test_what_is_locked_is_the_file_of_that_name_now(tmp_path):
    lock = FileLock(tmp_path / "a.lock")
    opened = lock._open
    lock._open = lambda: (opened(), lock.path.unlink(missing_ok=True), setattr(lock, "_open", opened))[0]
    assert lock.acquire()                                                       # deleted between opening and locking
    assert answer("FileLock", lock.path) == "refused"
    lock.release()


FORK = """
import os, pathlib, signal, sys
from lamamba.utils.locks import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    lock.release()
    try:
        FolderLock(pathlib.Path(sys.argv[1])).acquire()
    except BlockingIOError:
        print(os.getpid(), flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_child_neither_frees_nor_keeps_what_its_parent_holds(tmp_path):
    """Workers of a data loader may outlive their killed parent."""
    parent = subprocess.Popen([sys.executable, "-c", FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        assert "another job trains" in answer("FolderLock", tmp_path)
        parent.kill()
        parent.wait()
        assert answer("FolderLock", tmp_path) == "held"
    finally:
        parent.kill()
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_the_text_of_a_released_lock_is_gone(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert (tmp_path / ".lock").stat().st_size > 0
    lock.release()
    assert (tmp_path / ".lock").read_text() == ""
