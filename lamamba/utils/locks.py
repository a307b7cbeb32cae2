"""Exclusive locks on files and folders, dropped by the system when the process ends, however it ends.

They are POSIX record locks (fcntl), where the filelock package takes flock: record locks work on NFS, and a forked
child, such as a data loader's worker that outlives its killed parent, does not hold them. Two properties need care:

- They belong to the process: it may lock a file twice, and closing any descriptor of the file frees it. So this process
  remembers what it holds, by device and inode, and does not open such a file again.
- They belong to the file, not to its name: after locking, the name must still lead to the locked file, otherwise the
  file was deleted meanwhile and the new one is locked.

On Windows, locks of msvcrt.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from pathlib import Path

_LOCKED_BYTE = 1 << 20
"""Far behind the text, which others must be able to read on Windows."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_held: dict[tuple[int, int], int] = {}
"""Descriptors of the files that this process has locked, by device and inode."""
_mutex = threading.Lock()


class LocksUnsupported(OSError):
    """The file system has no locks."""


class FileLock:
    """An exclusive lock on a file, which is made where it is missing and stays when the lock is released."""

    def __init__(self, path: Path):
        self.path = path
        self._key: tuple[int, int] | None = None

    def acquire(self) -> bool:
        """Lock at once; False when another process, or another lock of this one, holds the file.

        Raises:
            FileNotFoundError: when its folder is missing.
            LocksUnsupported: when the file system has no locks.
        """
        with _mutex:
            while not self.is_held_here():
                handle = self._open()
                try:
                    if not self._lock(handle):
                        return False
                    key = _key(os.fstat(handle))
                    if key == _key_of(self.path):
                        self._key, _held[key] = key, handle
                        return True
                finally:
                    if handle not in _held.values():
                        os.close(handle)
            return False

    def is_held_here(self) -> bool:
        """Whether this process holds the file, by this lock or another."""
        return _key_of(self.path) in _held

    def release(self) -> None:
        """Free the file, where this lock holds it."""
        with _mutex:
            if (handle := _held.pop(self._key, None) if self._key else None) is not None:
                os.close(handle)                                                # closing unlocks
            self._key = None

    def write(self, text: str) -> None:
        """Replace the content of the locked file; opening it another way would free it."""
        if (handle := _held.get(self._key) if self._key else None) is not None:
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, text.encode())

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def _lock(self, handle: int) -> bool:
        return _lock_byte(handle)


class _DirectoryLock(FileLock):
    """flock on a folder itself, where the system has it: local disks, not NFS."""

    def _open(self) -> int:
        if sys.platform == "win32":
            raise LocksUnsupported("no locks on folders")
        return os.open(self.path, os.O_RDONLY)

    def _lock(self, handle: int) -> bool:
        return _lock_directory(handle)


class FolderLock:
    """One job per folder: a record lock on its file `.lock`, and, on local disks, a lock on the folder itself.

    The second one keeps other jobs out when somebody deletes `.lock` while a job runs.

    Args:
        folder: that exists.
        task: what the job does there, for messages: "trains".
    """

    def __init__(self, folder: Path, task: str = "trains"):
        self._folder, self._task = folder.resolve(), task
        self._file, self._directory = FileLock(self._folder / ".lock"), _DirectoryLock(self._folder)

    def acquire(self) -> None:
        """Lock the folder for this process.

        Raises:
            BlockingIOError: when another job holds it, naming its host and process.
            LocksUnsupported: when the file system has no locks.
        """
        acquired = True
        with contextlib.suppress(LocksUnsupported):
            acquired = self._directory.acquire()
        try:
            if not acquired or not self._file.acquire():
                raise self._refusal()
        except OSError:
            self._directory.release()
            raise
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        """Free the folder, where this lock holds it."""
        self._file.write("")
        self._file.release()
        self._directory.release()

    def _refusal(self) -> BlockingIOError:
        holder = ""
        if self._file.is_held_here() or self._directory.is_held_here():         # reading the file would free it
            holder = "this process"
        else:
            with contextlib.suppress(OSError):
                holder = self._file.path.read_text(encoding="utf-8").strip()
        return BlockingIOError(
            f"another job {self._task} in {self._folder} ({holder or 'of unknown name'}); wait for it, stop it, or "
            "give another folder as out"
        )


def _key(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _key_of(path: Path) -> tuple[int, int] | None:
    try:
        return _key(path.stat())
    except FileNotFoundError:
        return None


def _forget() -> None:
    """In a forked child: it inherits descriptors, not record locks; closing them keeps flock the parent's alone."""
    global _mutex
    for handle in _held.values():
        os.close(handle)
    _held.clear()
    _mutex = threading.Lock()                                                   # another thread may have held it


if sys.platform == "win32":
    import msvcrt

    def _lock_byte(handle: int) -> bool:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    os.register_at_fork(after_in_child=_forget)

    def _lock_byte(handle: int) -> bool:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in _UNSUPPORTED:
                raise LocksUnsupported(error.errno, "the file system has no locks; use another disk") from error
            raise
        return True

    def _lock_directory(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:                                                # NFS wants a file open for writing
            raise LocksUnsupported(error.errno, "no locks on folders") from error
        return True
