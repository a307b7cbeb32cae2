"""Which networks take turns: all of them, or LaMamba with each peer where they do not fit into memory together."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lamamba.benchmarking.throughput import Case, Processes, fit_together

MEDIANS = (
    "ms", "images_per_second", "multiply_adds_per_second", "product_multiply_adds_per_second", "share_of_product",
)
"""Figures of a network that was timed in several sets, of which the median is shown."""


def leave_out(cases: Sequence[Case]) -> tuple[list[Case], list[dict[str, Any]]]:
    """The networks that are estimated to fit into the free memory alone, and the others, each with its reason.

    Raises:
        RuntimeError: when no LaMamba network fits.
    """
    fitting = [case for case in cases if fit_together([case])]
    if not any(not case.is_peer for case in fitting):
        names = ", ".join(case.model for case in cases if not case.is_peer)
        raise RuntimeError(f"{names}: too large for the free memory of {cases[0].device}; take a smaller one, or batch")
    return fitting, [
        left_out(case, f"needs about {case.memory_estimate() / 2**30:.1f} GiB, more than is free")
        for case in cases if case not in fitting
    ]


def left_out(case: Case, reason: str) -> dict[str, Any]:
    """A network that is not timed, as a plain value."""
    return {"model": case.model, "image_size": case.image_size, "batch": case.batch, "reason": reason}


def sets_in_turns(cases: Sequence[Case], processes: Processes) -> Iterator[list[Case]]:
    """Sets of networks that take turns: all, or every LaMamba network with one peer, for each peer that fits beside.

    Peers that do not fit beside LaMamba are a set with it, whose networks are loaded one after the other.

    Args:
        cases: networks that fit into memory alone, LaMamba's among them.
        processes: "auto" makes sets of one peer where not all fit together.
    """
    ours, peers = [case for case in cases if not case.is_peer], [case for case in cases if case.is_peer]
    large = ours[0].product()
    if processes != "auto" or len(peers) < 2 or fit_together([*cases, large]):
        yield list(cases)
        return
    beside = [peer for peer in peers if fit_together([*ours, peer, large])]
    yield from ([*ours, peer] for peer in beside)
    if others := [peer for peer in peers if peer not in beside]:
        yield [*ours, *others]


def merge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each network and image size, in the order of their first rows: medians over its sets."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["image_size"], row["batch"], row["is_peer"], row["model"]), []).append(row)
    return [_merged(found[key]) for key in sorted(found, key=lambda key: key[:3])]


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(rows) == 1:
        return dict(rows[0])
    quartiles = zip(*(row["ms_quartiles"] for row in rows), strict=True)
    peaks = [row for row in rows if row["peak_memory_bytes"] is not None]
    largest = max(peaks, key=lambda row: row["peak_memory_bytes"], default=rows[0])
    return {
        **largest, **{key: statistics.median(row[key] for row in rows) for key in MEDIANS},
        "ms_quartiles": [statistics.median(values) for values in quartiles],
        "ms_fastest": min(row["ms_fastest"] for row in rows), "passes": sum(row["passes"] for row in rows), "set": None,
    }
