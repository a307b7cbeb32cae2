"""What tests do with files: hash them, list them as a checkpoint's, damage them, fill the disk, hide code in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

from lamamba.runs.folder import MANIFEST, RUN_VERSION, _hash_of_hashes
from lamamba.utils.files import write_json


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a folder, also in folders below, by their names."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_manifest(checkpoint: Path) -> None:
    """A checkpoint's manifest of the files that lie in it."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    found = hashes(checkpoint)
    write_json(checkpoint / MANIFEST, {
        "version": RUN_VERSION, "files": found, "files_sha256": _hash_of_hashes(found)})


class Bomb:
    """A pickle that leaves a file where it is opened."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def damage(path: Path, kind: str, chance: Random) -> None:
    """Change a "bit" of a file, "cut" it off anywhere, or make it "missing"."""
    if kind == "missing":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        content = content[: chance.randrange(len(content))]
    path.write_bytes(content)


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond this many bytes, as if the disk were full."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
