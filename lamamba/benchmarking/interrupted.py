"""The result file of a benchmark that was interrupted: what it holds, and who writes it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from lamamba.benchmarking.throughput import Case
from lamamba.options.base import Above0, Ge, Positive, from_dict, record
from lamamba.utils.files import differences_in_words, read_json
from lamamba.utils.locks import FileLock, LocksUnsupported


@record
class _Row:
    """A network that was timed; see `lamamba.benchmarking.throughput.measure`."""

    model: str
    image_size: Positive
    batch: Positive
    dtype: str
    device: str
    mode: str
    ms: Above0
    ms_quartiles: tuple[Above0, Above0]
    ms_fastest: Above0
    passes: Positive
    images_per_second: Above0
    peak_memory_bytes: Annotated[int, Ge(0)] | None
    activation_bytes_per_image: float | None
    multiply_adds: Positive
    parameters: Positive
    tokens: Positive
    multiply_adds_per_second: Above0
    product_multiply_adds_per_second: Above0
    share_of_product: Above0
    is_peer: bool
    compiled: bool
    packed_weights: bool
    in_memory_together: bool
    set: Positive


def interrupted_sets(path: Path | None, where: dict[str, Any], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Rows of an earlier call with the same networks, machine and settings that was interrupted; none of a whole one.

    Args:
        path: of the result, where there may be none yet.
        where: the environment now.
        cases: all networks to time.

    Raises:
        ValueError: when the file is damaged or edited, no result of a benchmark, or of an interrupted one of other
            networks, settings or another machine.
    """
    if path is None or not path.exists():
        return []
    found = read_json(path)
    if not {"rows", "environment"} <= found.keys():
        raise ValueError(f"{path} is no result of a benchmark and would be written over: name another file")
    if "plan" not in found:
        return []
    try:
        sets = found["sets"]
        rows = [from_dict(_Row, row, f"sets[{number}]") for number, row in enumerate(sets)]
        _check(rows, cases)
        before = dict(found["environment"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged, or was edited ({reason}): move it away to time all anew") from error
    now = json.loads(json.dumps(where))
    others = differences_in_words({**before, "date": None}, {**now, "date": None})
    if found["plan"] != [asdict(case) for case in cases]:
        others.insert(0, "other networks or settings")
    if others:
        raise ValueError(
            f"{path} holds an interrupted benchmark of another kind ({'; '.join(others)}); repeat its options to go "
            "on, or move it away"
        )
    return sets


def _check(rows: Sequence[_Row], cases: Sequence[Case]) -> None:
    """Check that rows are of the plan's networks, each once in a set, and that their figures are of one time."""
    seen = set()
    for number, row in enumerate(rows):
        is_planned = any(
            (row.model, row.image_size, row.batch, row.mode) == (case.model, case.image_size, case.batch, case.mode)
            for case in cases
        )
        place = row.set, row.model, row.image_size
        if not is_planned or place in seen:
            raise ValueError(f"sets[{number}]: {row.model} at {row.image_size} px is not planned, or there twice")
        seen.add(place)
        speed, share = 1000 * row.batch / row.ms, row.multiply_adds_per_second / row.product_multiply_adds_per_second
        for name, value in (("images_per_second", speed), ("share_of_product", share)):
            if not math.isclose(getattr(row, name), value, rel_tol=1e-6):
                raise ValueError(f"sets[{number}]: {name}={getattr(row, name):g} does not fit its time, {value:g} does")


@contextlib.contextmanager
def written_alone(path: Path | None) -> Iterator[None]:
    """A result file for this call alone, where the file system has locks.

    Raises:
        BlockingIOError: when another benchmark writes it.
    """
    if path is None:
        yield
        return
    lock, acquired = FileLock(path.with_name(f".{path.name}.lock")), True
    with contextlib.suppress(LocksUnsupported):
        acquired = lock.acquire()
    if not acquired:
        raise BlockingIOError(f"another benchmark writes {path}; wait for it, or name another file")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):                                      # in use, on Windows
            lock.path.unlink(missing_ok=True)
        lock.release()
