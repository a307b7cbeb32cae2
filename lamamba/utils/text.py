"""Words for numbers and values, text in columns, the first line of an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def counted(count: int, noun: str) -> str:
    """ "1 image", "2,000 images", "no classes". """
    plural = noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")
    return "1 " + noun if count == 1 else f"{count:,} {plural}" if count else f"no {plural}"


def aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells padded to their column's width: those of the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]


def first_line(error: BaseException) -> str:
    """Of an error's message; its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def shown(value: Any, most: int = 60) -> str:
    """A value as Python writes it, in one line (arrays have several) of so many characters at most."""
    text = re.sub(r"\s*\n\s*", " ", repr(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."
