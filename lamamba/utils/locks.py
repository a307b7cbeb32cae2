"""One job per folder: a lock that the operating system drops when its holder dies, however it dies."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_HELD: set[Path] = set()
"""Folders locked by this process: the system's locks do not keep a process from itself."""

_LOCKED_BYTE = 1 << 20
"""Far behind the text, which others must be able to read on Windows."""


class FolderLock:
    """Holds a folder for this process.

    A record lock on the file `.lock`, which also works on network disks: children do not inherit it, and nothing is
    left of it when the process is killed. The file itself stays.

    Raises:
        BlockingIOError: when another job holds the folder, naming its host and process.
    """

    def __init__(self, folder: Path):
        self._path = folder.resolve() / ".lock"
        self._handle: int | None = None

    def take(self) -> None:
        """Lock, or refuse."""
        if self._path in _HELD:
            raise self._refusal()
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle)
        except OSError as error:
            refusal = self._refusal()                                           # reads, then this handle may go
            os.close(handle)
            raise refusal from error
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._handle = handle
        _HELD.add(self._path)

    def release(self) -> None:
        """Let go, if this lock was taken."""
        if self._handle is None:
            return
        os.ftruncate(self._handle, 0)
        os.close(self._handle)                                                  # closing unlocks
        self._handle = None
        _HELD.discard(self._path)

    def _refusal(self) -> BlockingIOError:
        try:
            holder = self._path.read_text(encoding="utf-8").strip()
        except OSError:
            holder = ""
        return BlockingIOError(
            f"another job trains in {self._path.parent} ({holder or 'of unknown name'}); wait for it, stop it, or give "
            "another folder with --out"
        )


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)
