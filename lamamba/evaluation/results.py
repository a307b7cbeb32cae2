"""Result files of evaluations: figures with their protocol; tables of them, and which of them compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from lamamba.options.base import read_record, record
from lamamba.utils.files import write_json
from lamamba.utils.text import aligned

VERSION = 1
"""Of result files."""
MUST_AGREE = {
    "network": "the feature network, its weights and its resize",
    "reference": "the reference images",
    "images": "the number of samples",
    "image_shape": "the size of the images",
    "grey": "what is done with grey images",
    "settings": "neighbours, subsets and splits",
}
"""Parts of the protocol; results that differ in one of them do not compare."""
KNOWN = ("network", "reference", "images")
"""Parts of every protocol."""
LABELS = {
    "frechet": "{distance}", "frechet_spatial": "s{distance}", "inception_score": "{score}",
    "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage",
    "kernel": "{kernel} x 1000", "accuracy": "accuracy",
}
"""Names of figures in a table, in its order."""
WITHIN = {"inception_score": "inception_score_spread", "kernel": "kernel_spread"}
"""Figures that have a spread within one evaluation."""


@record
class Entry:
    """Figures of one set of weights at one guidance scale, or of existing images."""

    name: str
    step: int | None = None
    """Of the optimizer, for checkpoints."""
    ema: float | str | None = None
    """Decay of the average, or "none"."""
    guidance: float | None = None
    figures: dict[str, float]
    """By name, as `compute_figures` returns them; means over the seed ranges."""
    spread: dict[str, float] = field(default_factory=dict)
    """Standard deviations over the seed ranges; empty for one."""
    runs: list[dict[str, float]] = field(default_factory=list, repr=False)
    """Figures of each seed range."""
    protocol: dict[str, Any] = field(repr=False)
    """Everything that the figures depend on."""


@record
class _Result:
    version: int
    entries: Annotated[tuple[Entry, ...], MinLen(1)]


def read_result(path: str | Path) -> list[Entry]:
    """The entries of a result file.

    Raises:
        FileNotFoundError, ValueError: when it is missing, damaged, or of a newer format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; give a result that lamamba evaluate has written")
    entries = list(read_record(_Result, Path(path), VERSION).entries)
    for number, entry in enumerate(entries):
        if "frechet" not in entry.figures:
            raise ValueError(f"{path}: entries[{number}].figures has no frechet: it is damaged, evaluate again")
        if missing := [part for part in KNOWN if entry.protocol.get(part) is None]:
            raise ValueError(f"{path}: entries[{number}].protocol has no {missing[0]}: it is damaged, evaluate again")
    return entries


def write_result(path: Path, entries: Sequence[Entry]) -> None:
    """Write a result file atomically."""
    write_json(path, {"version": VERSION, "entries": [asdict(entry) for entry in entries]})


def disagreements(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which parts that must agree two protocols differ; their figures compare when this is empty."""
    found = []
    for part, words in MUST_AGREE.items():
        entries = _unequal(one.get(part), other.get(part))
        if part == "reference":
            entries.pop("name", None)                                           # which does not matter
        if entries:
            said = (f"{key} {mine} against {theirs}".strip() for key, (mine, theirs) in entries.items())
            found.append(f"{words} ({', '.join(said)})")
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Other differences: what one compares, such as the network's architecture, sampler and seeds."""
    return [
        f"{part}{'.' if key else ''}{key}: {mine} | {theirs}"
        for part in {**one, **other} if part not in MUST_AGREE
        if part != "architecture" or None not in (one.get(part), other.get(part))      # images, and older results
        for key, (mine, theirs) in _unequal(one.get(part), other.get(part)).items()
    ]


def _unequal(mine: Any, theirs: Any) -> dict[str, tuple[str, str]]:
    """Both values in short, by the key where they differ; "" where they are no dictionaries."""
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        mine, theirs = {"": mine}, {"": theirs}
    pairs = {key: (mine.get(key), theirs.get(key)) for key in {**mine, **theirs}}
    return {key: (_short(a), _short(b)) for key, (a, b) in pairs.items() if a != b}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}.."


def table(entries: Sequence[Entry]) -> str:
    """Figures as lines of text, one column for each entry (one line, for more than three); spreads after a ± sign."""
    rows = [["", *(entry.name for entry in entries)]]
    for key, label in LABELS.items():
        if not any(key in entry.figures for entry in entries):
            continue
        distance = entries[0].protocol.get("distance_name", "Fréchet distance")
        score, kernel = ("Inception Score", "KID") if distance == "FID" else ("class score", "kernel distance")
        label = label.format(distance=distance, score=score, kernel=kernel)
        rows.append([label, *(_cell(entry, key) for entry in entries)])
    if len(entries) > 3:                                                        # many results: one line each
        rows = [list(column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in aligned(rows))


def _cell(entry: Entry, key: str) -> str:
    if key not in entry.figures:
        return "-"
    scale = 1000 if key == "kernel" else 1
    digits = 3 if key == "kernel" else 4
    text = f"{round(scale * entry.figures[key], digits) + 0.0:.{digits}f}"     # no minus before 0
    spread = entry.spread.get(key)
    if spread is None and key in WITHIN and not entry.spread:
        spread = entry.figures.get(WITHIN[key])
    return text if spread is None else f"{text} ± {scale * spread:.{digits}f}"
