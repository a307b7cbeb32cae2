"""Work that any number of processes share through a folder, without speaking to each other.

The work is cut into numbered pieces. A process claims a piece with a lock that the system drops when the process dies,
however it dies, makes it, and notes that it is whole. So a killed process leaves nothing that looks finished, another
takes over its piece, and starting again goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.5
"""Between looks at what other processes are still making."""


class Claims:
    """Locks in a folder, one for each piece of work.

    Args:
        folder: holds the lock files while the work goes on.
        is_over: whether all is done; the last process then removes the folder.
    """

    def __init__(self, folder: Path, is_over: Callable[[], bool]):
        self._folder, self._is_over = folder, is_over

    @contextmanager
    def claim(self, name: str, *, waits: bool = False) -> Iterator[bool]:
        """Hold a piece of work; whether nobody else does. The system lets go of it when this process dies."""
        try:
            handle = os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:                                               # all is done, and tidied up by another
            yield self._is_over() and waits
            return
        try:
            while not (mine := _lock(handle)) and waits:
                time.sleep(POLL_SECONDS)
            yield mine
        finally:
            os.close(handle)                                                    # closing unlocks

    def make_all(
        self, numbers: Iterable[int], name: Callable[[int], str], is_made: Callable[[int], bool],
        make: Callable[[int], None], on_wait: Callable[[], None],
    ) -> None:
        """Take piece after piece that nobody has made or is making; then wait for the others, in case one dies.

        Args:
            numbers: all pieces, in the order in which this process tries them.
            name: a piece's lock, without its suffix.
            is_made: looks on the disk.
            make: makes a piece and notes that it is whole.
            on_wait: called before every pause.
        """
        numbers = list(numbers)
        while not self._is_over():
            busy = 0
            for number in numbers:
                if is_made(number):
                    continue
                with self.claim(name(number)) as mine:
                    if not mine:
                        busy += 1
                    elif not is_made(number):                                   # made since we looked
                        make(number)
            if not busy:
                return
            on_wait()
            time.sleep(POLL_SECONDS)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import errno
    import fcntl

    def _lock(handle: int) -> bool:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):   # a disk without locks: at worst a piece
                return True                                                     # is made twice, with the same bytes
            raise
        return True
