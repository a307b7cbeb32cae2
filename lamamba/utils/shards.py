"""Work in shards that any number of processes share through a folder, without communicating otherwise.

A process locks a shard (lamamba/utils/locks.py), writes its files atomically, and then a note with their sizes and
hashes. So a killed process leaves nothing that looks finished, another takes over its shard, and starting again goes
on. When all shards have notes, one process verifies every hash, writes the result and removes the folder of unfinished
work; a shard that is damaged by then is made again.

    FOLDER/...                           the results
    FOLDER/.unfinished/plan.json         what is being made
    FOLDER/.unfinished/shard_00003.json  note of a finished shard
    FOLDER/.unfinished/shard_00004.lock  locked while a process makes the shard
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from typing_extensions import Self

from lamamba.utils.files import check_folder, differences_in_words, read_json, sha256, write_all, write_atomically
from lamamba.utils.locks import FileLock, LocksUnsupported
from lamamba.utils.progress import Progress, Report

logger = logging.getLogger("lamamba.shards")

PLAN = "plan.json"
"""In the hidden folder of unfinished work."""
POLL_SECONDS = 0.5
"""Between checks of what other processes are making."""
MAX_ROUNDS = 3
"""Times that damaged shards are made again before the disk is called broken."""
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

Note = dict[str, Any]
"""What is kept of a finished shard."""


class ShardPlan(ABC):
    """All that decides the content of the shards: processes with equal plans write the same bytes."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int]:
        """Images in all, and in a shard (but for the last)."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Any, where: str | Path = "") -> Any:
        """Undo `to_dict`.

        Args:
            values: from a file.
            where: the file, for messages.

        Raises:
            ValueError: for entries that are missing or unknown, or do not fit.
        """

    def compared(self) -> dict[str, Any]:
        """The entries that decide the content."""
        return self.to_dict()

    def differences(self, other: ShardPlan) -> list[str]:
        """Where another plan gives other content, one phrase for each entry."""
        return differences_in_words(self.compared(), other.compared())

    @property
    def num_shards(self) -> int:
        total, size = self.sizes
        return -(-total // size)

    def shard_range(self, number: int) -> range:
        """The images of a shard."""
        total, size = self.sizes
        return range(number * size, min((number + 1) * size, total))


@dataclass(frozen=True)
class PlainPlan(ShardPlan):
    """A plan of plain values; a subclass says where the sizes are among them."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.values))

    @classmethod
    def from_dict(cls, values: Any, where: str | Path = "") -> Self:
        return cls(values)


P = TypeVar("P", bound=ShardPlan)


class ShardedJob(ABC, Generic[P]):
    """One process's part in filling a folder by a plan; a subclass says how a shard and the result are made.

    Args:
        folder: for the results; new, or with what an earlier call or another process has made by an equal plan.
        plan: what to make.
        rank: of this process among those that start together, so that they begin at different shards.
        report: called with the progress.
    """

    version: int
    """Of the format of plan and notes."""
    unfinished: str
    """Name of the hidden folder that holds plan, notes and locks until all is done."""
    result: str
    """Name of the file that is written last: where it is, all is done."""
    task: str
    """For the progress."""
    what: str
    """The results in a word, for messages."""
    unit: str = "images"
    """What the shards are made of, in a word."""
    own: tuple[str, ...] = ()
    """How names of results begin that may be in the folder before the work; others are refused."""
    digits = 5
    """Of a shard's number in file names."""

    def __init__(self, folder: Path, plan: P, *, rank: int = 0, report: Report | None = None):
        self.folder, self.work, self.plan = folder, folder / self.unfinished, plan
        self.notes: dict[int, Note] = {}
        """Of the shards that are known to be finished."""
        start = rank % plan.num_shards
        self._order = [*range(start, plan.num_shards), *range(start)]
        self._send = report or (lambda progress: None)
        self._resumed = 0

    # what a subclass supplies

    @abstractmethod
    def make_shard(self, number: int, advance: Callable[[float], None]) -> tuple[Mapping[str, bytes], Note]:
        """The files of a shard by name, and further entries of its note; calls advance(images done) on the way."""

    @abstractmethod
    def finish(self, notes: list[Note]) -> str:
        """Write what is made of all shards; returns the content of the result file."""

    @abstractmethod
    def read_result(self) -> tuple[P, Mapping[int, Note], Mapping[str, list[Any]]]:
        """Of a finished folder: its plan, the shards' notes by number (none where their record is damaged), and the
        files made of all shards as {name: [size, SHA-256]}."""

    def make_note(self, files: dict[str, list[Any]], more: Note) -> Note:
        """The note of a shard whose files are {name: [size, SHA-256]}."""
        return {"version": self.version, "files": files, **more}

    def files_of(self, note: Note) -> Mapping[str, list[Any]]:
        """Undo `make_note`."""
        return note["files"]

    def check_note(self, number: int, note: Note) -> None:
        """Check what a file says of a shard: damaged notes are as none, and the shard is made anew.

        Raises:
            ValueError, KeyError, TypeError: when it is no note of this shard.
        """

    def path(self, name: str) -> Path:
        """Where a file of a shard is; in `work`, if it is not to be kept."""
        return self.folder / name

    # the job

    def run(self) -> None:
        """Make what is missing, together with other processes that do the same; return when all is there and verified.

        Raises:
            FileExistsError: when the folder holds something else.
            ValueError: when it holds results of another plan, with the differences.
            OSError: when the disk is full or broken, or the folder of unfinished work is gone; finished shards stay.
        """
        with self._naming_full_disks():
            if not self._is_intact():
                self._begin()
                for _ in range(MAX_ROUNDS):
                    self._make_missing()
                    if self._finish():
                        break
                else:
                    raise OSError(
                        f"shards of {self.folder} were damaged {MAX_ROUNDS} times as soon as they were written"
                    )
            self._clean_up()

    def is_finished(self) -> bool:
        return (self.folder / self.result).is_file()

    def report(self, task: str = "", done: float | None = None, note: str = "") -> None:
        """Report a number of images; by default those of the finished shards, whoever made them."""
        done = self._num_finished if done is None else done
        resumed = 0 if task else self._resumed
        total = self.plan.sizes[0]
        self._send(Progress(task or self.task, int(done), total, unit=self.unit, resumed=resumed, note=note))

    @property
    def _num_finished(self) -> int:
        (total, size), last = self.plan.sizes, self.plan.num_shards - 1
        return len(self.notes) * size - ((last + 1) * size - total if last in self.notes else 0)

    def _is_intact(self) -> bool:
        """Whether all is there, by the same plan and undamaged. Otherwise the folder is unfinished again."""
        if not self.is_finished():
            return False
        plan, notes, files = self.read_result()
        self._check_same(plan)
        faults, intact = [self._fault(files)] if files else [], {}
        for number, note in notes.items():
            if fault := self._fault(self._kept_files(note)):
                faults.append(fault)
            else:
                intact[number] = note
            self.report("verifying", done=self.plan.shard_range(number).stop)
        found = [fault for fault in faults if fault]
        if len(notes) < self.plan.num_shards:
            found.append(f"the record of the shards of {self.folder} is damaged")
        if not found:
            return self.is_finished()                                           # or others have found damage meanwhile
        missing = self.plan.num_shards - len(intact)
        logger.warning("%s: made anew, %d of %d shards", "; ".join(found[:3]), missing, self.plan.num_shards)
        with self._locked("finish"):
            if self.is_finished():
                self._write_plan()
                for number, note in intact.items():
                    self._write_note(number, note)
                (self.folder / self.result).unlink()
        return False

    def _kept_files(self, note: Note) -> Mapping[str, list[Any]]:
        """Those that are not removed with the folder of unfinished work."""
        return {name: entry for name, entry in self.files_of(note).items() if self.path(name).parent != self.work}

    def _begin(self) -> None:
        """Make the folder of unfinished work, or join the processes that work in it."""
        check_folder(self.folder)
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        foreign = [name for name in names if not name.startswith(self.own)]
        for name in names:                                                      # of shards that are still to be made
            if name.startswith(tuple(filter(None, self.own))):
                self._check_no_folder(self.folder / name)
        if foreign and not self.work.is_dir() and not self.is_finished():       # others may be making them just now
            raise FileExistsError(
                f"{self.folder} exists and holds something else ({', '.join(foreign[:3])}); give another folder as out"
            )
        with self._locked("plan"):
            path = self.work / PLAN
            if self.is_finished():
                return
            if path.is_file():
                self._check_same(type(self.plan).from_dict(read_json(path, self.version).get("plan"), path))
            else:
                self._write_plan()
        for number in self._order:
            self._check_note_files(number)
            self._look(number)
        self._resumed = self._num_finished

    def _check_note_files(self, number: int) -> None:
        """Check that no file of a shard that was made is a folder now."""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):      # no note: it is made
            for name in self.files_of(read_json(self._note_path(number), self.version)):
                self._check_no_folder(self.path(name))

    def _write_plan(self) -> None:
        values = {"version": self.version, "plan": self.plan.to_dict()}
        write_atomically(self.work / PLAN, json.dumps(values) + "\n")

    def _check_same(self, old: P) -> None:
        if found := old.differences(self.plan):
            raise ValueError(
                f"{self.folder} holds {self.what} made otherwise ({'; '.join(found)}); repeat the options to go on "
                "with them, or give another folder as out"
            )

    def _make_missing(self) -> None:
        """Make shard after shard that nobody has made or is making; then wait for the others, in case one dies."""
        self.report()
        while not self.is_finished():
            busy = 0
            for number in self._order:
                if self._look(number):
                    continue
                with self._try_lock(self._name(number)) as is_mine:
                    if not is_mine:
                        busy += 1
                    elif not self._look(number):                                # made since the first look
                        self._make(number)
            if not busy:
                return
            if not self.work.is_dir() and not self.is_finished():
                raise FileNotFoundError(
                    f"{self.work} is gone: it was removed, or the current folder was changed meanwhile; run the same "
                    "command again"
                )
            self.report(note="waiting for other processes")
            time.sleep(POLL_SECONDS)

    def _make(self, number: int) -> None:
        contents, more = self.make_shard(number, lambda done: self.report(done=self._num_finished + done))
        written = write_all({self.path(name): content for name, content in contents.items()})
        files = {name: written[self.path(name)] for name in contents}
        self.notes[number] = note = self.make_note(files, more)
        self._write_note(number, note)
        self.report()

    def _look(self, number: int) -> bool:
        """Whether a shard has a note, and files of the sizes that it says."""
        if number not in self.notes and (note := self._read_note(number)) is not None:
            self.notes[number] = note
        return number in self.notes

    def _read_note(self, number: int) -> Note | None:
        try:
            note = read_json(self._note_path(number), self.version)
            self.check_note(number, note)
            files = self.files_of(note).items()
            return note if all(self.path(name).stat().st_size == size for name, (size, _) in files) else None
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            return None

    def _write_note(self, number: int, note: Note) -> None:
        write_atomically(self._note_path(number), json.dumps(note) + "\n")

    def _note_path(self, number: int) -> Path:
        return self.work / f"{self._name(number)}.json"

    def _name(self, number: int) -> str:
        return f"shard_{number:0{self.digits}d}"

    def _finish(self) -> bool:
        """Verify all shards and write the result: one process does it, the others wait for it.

        Returns:
            False when a shard is damaged or missing, and is to be made again.
        """
        if self.is_finished():
            return True
        with self._locked("finish"):
            if self.is_finished():
                return True
            self.notes.clear()
            for number in range(self.plan.num_shards):
                if (note := self._read_note(number)) is None:                   # others have found it damaged
                    continue
                if fault := self._fault(self.files_of(note)):
                    logger.warning("%s: the shard is made anew", fault)
                    self._note_path(number).unlink(missing_ok=True)
                    continue
                self.notes[number] = note
                self.report("verifying", done=self.plan.shard_range(number).stop)
            if len(self.notes) < self.plan.num_shards:
                return False
            content = self.finish([self.notes[number] for number in range(self.plan.num_shards)])
            for path in self.folder.glob(".*.tmp"):                             # of killed processes
                path.unlink(missing_ok=True)
            write_atomically(self.folder / self.result, content)
        return True

    def _clean_up(self) -> None:
        """Remove the folder of unfinished work; a process that was killed at the very end has left it."""
        if self.work.is_dir():
            with self._locked("finish"):
                if self.is_finished():
                    shutil.rmtree(self.work, ignore_errors=True)

    def _fault(self, files: Mapping[str, list[Any]]) -> str | None:
        """The first file that is missing or not as it was written, by its content."""
        for name, entry in files.items():
            path = self.path(name)
            self._check_no_folder(path)
            if not path.is_file():
                return f"{path} is missing"
            if [path.stat().st_size, sha256(path)] != entry:
                return f"{path} is not what was written"
        return None

    def _check_no_folder(self, path: Path) -> None:
        if path.is_dir():
            raise FileExistsError(
                f"{path} is a folder where a file of the {self.what} belongs; move it away and run the same command "
                "again"
            )

    @contextmanager
    def _try_lock(self, name: str) -> Iterator[bool]:
        """Lock a shard, unless another process has it."""
        lock = FileLock(self.work / f"{name}.lock")
        try:
            is_mine = lock.acquire()
        except LocksUnsupported:
            is_mine = True                                                      # at worst made twice, the same bytes
        except FileNotFoundError:                                               # all is done, and cleaned up by others
            is_mine = False
        try:
            yield is_mine
        finally:
            lock.release()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Lock, when the others are done; makes the folder of unfinished work."""
        while True:
            self.work.mkdir(parents=True, exist_ok=True)
            with self._try_lock(name) as is_mine:
                if is_mine:
                    yield
                    return
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _naming_full_disks(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(
                f"{self.folder} takes no more ({error.strerror}): {self._num_finished:,} of {self.plan.sizes[0]:,} "
                f"{self.unit} are finished and stay; make room and run the same command again"
            ) from error
