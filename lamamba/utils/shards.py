"""Work that any number of processes share through a folder, without speaking to each other.

The work is cut into numbered pieces. A process claims a piece with a lock that the system drops when the process dies,
however it dies, makes it, and notes that it is whole. So a killed process leaves nothing that looks finished, another
takes over its piece, and starting again goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lamamba.utils.files import read_json, write_atomically

PLAN = "plan.json"
"""In the hidden folder of unfinished work."""
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


class Plan(Protocol):
    """What the work is to make."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""

    def differences(self, other: Any) -> list[str]:
        """Where another plan would make something else, one phrase for each entry."""


AnyPlan = TypeVar("AnyPlan", bound=Plan)


class PlannedFolder(Generic[AnyPlan]):
    """A folder that any number of processes fill by one plan.

    Args:
        folder: for the results.
        unfinished: name of the hidden folder in it that holds plan, notes and locks until all is done.
        plan: this process's.
        read: a plan from its dictionary.
        version: of the format.
        what: the results in a word, for messages.
        own: how names of results begin that may lie there before the work does; all others are refused.
        is_over: whether all is done.
    """

    def __init__(
        self, folder: Path, unfinished: str, plan: AnyPlan, read: Callable[[dict[str, Any]], AnyPlan], *,
        version: int, what: str, own: str | None = None, is_over: Callable[[], bool],
    ):
        self.folder, self.work, self.plan = folder, folder / unfinished, plan
        self._read, self._version, self._what, self._own, self._is_over = read, version, what, own, is_over
        self.claims = Claims(self.work, is_over)

    def begin(self) -> None:
        """Make the folder, or join those who work in it.

        Raises:
            FileExistsError: when it holds something else.
            ValueError: when it holds results of another plan.
        """
        if not self.work.is_dir() and self.folder.is_dir():
            names = sorted(path.name for path in self.folder.iterdir())
            foreign = [name for name in names if self._own is None or not name.startswith(self._own)]
            if foreign and not self.work.is_dir():                              # another may be making it just now
                raise FileExistsError(
                    f"{self.folder} exists and holds something else ({', '.join(foreign[:3])}); give another folder "
                    "with --out"
                )
        self.work.mkdir(parents=True, exist_ok=True)
        with self.claims.claim("plan", waits=True):
            if self._is_over():                                                 # others have just finished
                return
            path = self.work / PLAN
            if path.is_file():
                self.check_same(self._read(read_json(path, self._version).get("plan", {})))
            else:
                self.write_plan()

    def write_plan(self) -> None:
        values = {"version": self._version, "plan": self.plan.to_dict()}
        write_atomically(self.work / PLAN, json.dumps(values) + "\n")

    def check_same(self, old: AnyPlan) -> None:
        """Refuse results of another plan.

        Raises:
            ValueError: with the differences.
        """
        if found := old.differences(self.plan):
            raise ValueError(
                f"{self.folder} holds {self._what} made otherwise ({'; '.join(found)}); repeat the options to go on "
                "with them, or give another folder with --out"
            )


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
