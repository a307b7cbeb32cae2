"""Small habits with files: JSON that names itself when it is broken, files that are never half written."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path, newest_version: int) -> dict[str, Any]:
    """A JSON object with a version from a file.

    Raises:
        ValueError: when the file is missing, damaged or of a newer format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is damaged: there is no version in it")
    if version > newest_version:
        raise ValueError(f"{path} has format version {version}, this lamamba reads up to {newest_version}; upgrade it")
    return values


def temporary_name(path: Path) -> Path:
    """A name beside a file that no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def settle(temporary: Path, path: Path) -> None:
    """Give a whole file its name: flushed to disk first, so that a file of that name is never half of it."""
    flush(temporary)
    os.replace(temporary, path)
    if os.name != "nt":
        flush(path.parent)


def flush(path: Path) -> None:
    """Have a file or a folder's list of names on the disk before going on."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that it is always the old one or the new one."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], here: str = "here") -> list[str]:
    """Where two plain descriptions differ, one phrase per entry."""
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} {here}"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key) != new.get(key)
    ]
