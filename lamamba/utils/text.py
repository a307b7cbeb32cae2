"""Words for numbers."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """ "1 image", "2,000 images", "no classes". """
    plural = noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")
    return "1 " + noun if count == 1 else f"{count:,} {plural}" if count else f"no {plural}"
