"""lamamba.compare: results of evaluations side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lamamba.evaluation.results import Entry, differences, disagreements, read_result, table
from lamamba.options.base import verb
from lamamba.options.evaluation import CompareOptions


@dataclass(frozen=True)
class CompareResult:
    """Entries of the same protocol."""

    entries: tuple[Entry, ...]
    """Of all files, named by file, and by entry where a file has several."""
    differences: tuple[tuple[str, ...], ...]
    """Of each entry: how its protocol differs from the first one's: architecture, sampler, guidance, seeds."""

    def __str__(self) -> str:
        first, lines = self.entries[0], [table(self.entries)]
        for entry, found in zip(self.entries, self.differences, strict=True):
            if found:
                lines += [f"\n{first.name} | {entry.name}", *(f"  {line}" for line in found)]
        return "\n".join(lines)


@verb
def compare(options: CompareOptions) -> CompareResult:
    """Read results and compare their protocols.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when one is damaged, or they differ in what must agree (feature network, reference, number and size
            of images, options of the metrics), which is named.
    """
    entries: list[Entry] = []
    for path in options.results:
        found = read_result(path)
        entries += [
            dataclasses.replace(entry, name=path.stem + (f" {entry.name}" if len(found) > 1 else "")) for entry in found
        ]
    first = entries[0]
    for entry in entries[1:]:
        if reasons := disagreements(first.protocol, entry.protocol):
            names = f"{first.name} and {entry.name}"
            raise ValueError(f"{names} cannot be compared: they differ in {'; '.join(reasons)}")
    return CompareResult(tuple(entries), tuple(tuple(differences(first.protocol, entry.protocol)) for entry in entries))
