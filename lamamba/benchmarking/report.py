"""Results of a benchmark as text: the table, and the environment."""

from __future__ import annotations

from typing import Any

from lamamba.utils.text import aligned

HEADINGS = (
    "network", "px", "batch", "images/s", "ms a pass", "quartiles", "peak MiB", "MiB an image", "G multiply-adds",
    "LaMamba / DiT",
)


def table(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> str:
    """Markdown table of rows and ratios of `lamamba.benchmarking.throughput`, with aligned columns."""
    cells: list[tuple[str, ...]] = [HEADINGS]
    for row in rows:
        same = [
            ratio for ratio in ratios
            if ratio["model"] == row["model"] and all(ratio[key] == row[key] for key in ("image_size", "batch", "mode"))
        ]
        low, high = row["ms_quartiles"]
        peak, activations = row["peak_memory_bytes"], row["activation_bytes_per_image"]
        cells.append((
            row["model"], str(row["image_size"]), str(row["batch"]), f"{row['images_per_second']:.3g}",
            f"{row['ms']:.1f}", f"{low:.1f} - {high:.1f}", f"{peak / 2**20:.0f}" if peak is not None else "-",
            f"{activations / 2**20:.0f}" if activations is not None else "-",
            f"{row['multiply_adds'] / 1e9:.2f}",
            ", ".join(f"{ratio['ratio']:.2f}" + (f" ({ratio['peer']})" if len(same) > 1 else "") for ratio in same),
        ))
    heading, *others = aligned(cells)
    rule = ["-" * (len(heading[0]) + 2), *("-" * (len(cell) + 1) + ":" for cell in heading[1:])]
    lines = ["| " + " | ".join(line) + " |" for line in (heading, *others)]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def describe(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of device, versions, commit and back end, for the lines above a table."""
    settings, versions = environment["settings"], environment["versions"]
    backend = f"{settings['backend']}, {settings['threads']} threads{', compiled' if settings['compile'] else ''}"
    if settings["packed_weights"]:
        backend += ", bfloat16 weights packed for oneDNN"
    shown = [name for name in ("lamamba", "torch", "diffusers", "triton") if versions[name]]
    found = ", ".join(f"{name} {versions[name]}" for name in shown)
    lines = [
        ("device", environment["device"]), ("versions", found),
        ("commit", f"{environment['commit']}, {environment['date']}"), ("scan", backend),
    ]
    if settings["malloc"]:
        lines.append(("malloc", "networks run in processes started with " + " ".join(
            f"{name}={value}" for name, value in settings["malloc"].items()
        )))
    return lines
