"""Files: text and JSON whose errors name the file; writing that leaves the old content or the new, never a part."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamamba.utils.text import shown


def read_text(path: Path) -> str:
    """Text in UTF-8, with or without the byte order mark that some editors write.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}: {error.reason}); save it as such") from None


def parse_json(text: str) -> Any:
    """A value from JSON, which has no NaN and no infinity.

    Raises:
        ValueError: when it is none.
    """
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, newest_version: int | None = None) -> dict[str, Any]:
    """A JSON object from a file; one with a version, where the newest that the caller can read is given.

    Raises:
        OSError: when the file may not be read.
        ValueError: when it is missing, damaged or of a newer format.
    """
    try:
        values = parse_json(read_text(path))
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    if newest_version is not None:
        version = values.get("version")
        if type(version) is not int or version < 1:
            raise ValueError(f"{path} is damaged: version={shown(version)} must be a whole number from 1")
        if version > newest_version:
            raise ValueError(
                f"{path} has format version {version}, this lamamba reads up to {newest_version}; upgrade it"
            )
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with indentation."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def append_json(path: Path, values: Mapping[str, Any]) -> None:
    """Append a JSON object as a line, after a line end where a kill or a full disk has cut the last one off."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(values).encode() + b"\n")


def temporary_name(path: Path) -> Path:
    """A name beside a file that no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def check_current_folder() -> None:
    """Check that the current folder is still there: relative paths lead nowhere without it, and MKL ends the process.

    Raises:
        FileNotFoundError: when it was removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise FileNotFoundError("the current folder was removed; change to one that exists (cd, os.chdir)") from error


def check_target(path: Path) -> None:
    """Check before long work that its result can be written; makes the folder.

    Raises:
        ValueError: when the path is a folder.
        OSError: when no file can be written there.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if not (nearest := _nearest(path.parent)).is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {nearest} is a file; nothing was done: name another place")
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        reason = error.strerror
        raise OSError(f"{path} cannot be written ({reason}); nothing was done yet: name another place") from error


def check_folder(path: Path, *, is_new: bool = False) -> None:
    """Check before long work that a folder can hold its results; nothing is made.

    Args:
        is_new: it must not exist yet.

    Raises:
        FileExistsError: when it exists and must not.
        OSError: when no folder can be made there, or nothing be written into it.
    """
    if is_new and path.exists():
        raise FileExistsError(f"{path} exists already; remove it or name another place")
    nearest = _nearest(path)
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be made: {nearest} is a file; nothing was done: name another place")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {nearest} may only be read; name another place")


def _nearest(path: Path) -> Path:
    """A path, or the nearest one above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary file to write, which is flushed and renamed to the path at the end; removed when that fails.

    Args:
        path: its folder is made where there is none.
        suffix: that the temporary name is to have, for libraries that go by it.

    Raises:
        OSError: naming the path, for a full disk, too.
    """
    temporary = temporary_name(path)
    temporary = temporary.with_suffix(suffix) if suffix else temporary
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            temporary.unlink()


def flush(path: Path) -> None:
    """fsync of a file or a folder."""
    if os.name == "nt" and path.is_dir():                                       # Windows flushes files only
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file: at any time it has the old content or the new."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_all(contents: Mapping[Path, bytes]) -> dict[Path, list[int | str]]:
    """Write several files: all under temporary names, flushed to disk, then renamed.

    Returns:
        Size and SHA-256 of each.
    """
    if taken := [path for path in contents if path.is_dir()]:
        raise IsADirectoryError(f"{taken[0]} is a folder where a file is to be written; move it away")
    temporaries = {path: temporary_name(path) for path in contents}
    try:
        for path, temporary in temporaries.items():
            temporary.write_bytes(contents[path])
            flush(temporary)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        flush(folder)
    return {path: [len(content), hashlib.sha256(content).hexdigest()] for path, content in contents.items()}


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two plain descriptions differ: (dotted name of the entry, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            child = f"{name}.{key}" if name else str(key)
            found += differences(old.get(key, "nothing"), new.get(key, "nothing"), child)
        return found
    return [] if old == new else [(name, old, new)]


def differences_in_words(old: Any, new: Any) -> list[str]:
    """Where two plain descriptions differ, one phrase for each entry."""
    return [f"{name}: {there!r} there, {here!r} here" for name, there, here in differences(old, new)]


def attribute_differences(there: object, here: object, names: Sequence[str]) -> list[str]:
    """In which attributes two objects differ, one phrase for each."""
    old, new = ({name: getattr(each, name) for name in names} for each in (there, here))
    return differences_in_words(old, new)
