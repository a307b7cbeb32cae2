"""The paper's table of systems with our counts beside the published ones; nothing is allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from lamamba.benchmarking.flops import Operations, lamamba_operations
from lamamba.benchmarking.peers.registry import PEERS, peer_operations
from lamamba.benchmarking.published import REMARKS, Published, published_rows
from lamamba.benchmarking.throughput import parse_model
from lamamba.config import LATENT_SCALE, UNetConfig
from lamamba.utils.text import aligned, counted

HEADINGS = ("system", "M", "published", "G products", "G scan", "G total", "published", "FID", "")


@dataclass(frozen=True)
class ComparedRow:
    """A system with our counts, where it can be counted, beside what is published."""

    published: Published
    counted: Operations | None
    """None: published figures only."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.counted
        values = {**asdict(found), "paper_total": found.paper_total} if found else None
        return {**asdict(self.published), "counted": values}


@dataclass(frozen=True)
class Comparison:
    """Systems of the paper's table, for one image and one forward pass of each network."""

    image_size: int
    rows: tuple[ComparedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"image_size": self.image_size, "rows": [row.to_dict() for row in self.rows], "remarks": list(REMARKS)}

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [HEADINGS]
        notes: list[str] = []
        for row in self.rows:
            published, found = row.published, row.counted
            if published.wrong and published.wrong not in notes:
                notes.append(published.wrong)
            mark = f"[{notes.index(published.wrong) + 1}]" if published.wrong else ""
            ours = ["-"] * 4
            if found:
                values = found.parameters / 1e6, found.matrix / 1e9, found.scan / 1e9, found.paper_total / 1e9
                ours = [f"{value:.2f}" for value in values]
            cells.append((
                published.system, ours[0], _number(published.parameters), *ours[1:], _number(published.multiply_adds),
                _number(published.frechet), mark if found else f"published only {mark}".strip(),
            ))
        lines = [" ".join(f"{cell}  " for cell in line).rstrip() for line in aligned(cells)]
        rule = "-" * max(map(len, lines))
        notes = [*REMARKS, *(f"[{number}] {note}" for number, note in enumerate(notes, 1))]
        notes = [fill(note, 118, subsequent_indent="    ") for note in notes]
        title = f"one image of {self.image_size} x {self.image_size} px, one forward pass; M parameters"
        return "\n".join([title, "", lines[0], rule, *lines[1:], "", *notes])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def compare_systems(name: str, config: UNetConfig, operations: Operations) -> Comparison:
    """The paper's table for the image size of a network, which is its last row unless it is one already.

    Args:
        name: of the network, for its row.
        config: of the network; it works on latents of square images.
        operations: of the network.

    Raises:
        ValueError: when it works on pixels, or its images are not square.
    """
    height, width = config.input_size
    if config.in_channels in (1, 3):
        raise ValueError(
            f"the network works on pixels of {counted(config.in_channels, 'channel')}, and the paper's table is of "
            f"latents {LATENT_SCALE} times smaller than the image; give a preset and --image-size"
        )
    if height != width:
        raise ValueError(
            f"the network works on {height} x {width} latents, and the paper's table has square images; "
            "give a preset and --image-size"
        )
    image_size = height * LATENT_SCALE
    rows = [ComparedRow(published, _count(published.network, image_size)) for published in published_rows(image_size)]
    if config != parse_model("xl-n16", image_size):
        rows.append(ComparedRow(Published(f"{name}, {counted(config.state_size, 'state')}"), operations))
    return Comparison(image_size, tuple(rows))


def _count(network: str | None, image_size: int) -> Operations | None:
    if network is None:
        return None
    return peer_operations(network, image_size) if network in PEERS else \
        lamamba_operations(parse_model(network, image_size))
