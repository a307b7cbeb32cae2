"""Results of a benchmark as text: the table, and the environment."""

from __future__ import annotations

from typing import Any

from lamamba.benchmarking.peers.registry import PEERS
from lamamba.utils.text import aligned

OURS = "our scan and window attention"
"""What runs LaMamba's layers, beside `Peer.care`."""

HEADINGS = (
    "network", "px", "batch", "images/s", "ms a pass", "quartiles", "peak MiB", "MiB an image", "G multiply-adds",
    "G/s", "of a product",
)


def table(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> str:
    """Markdown table of rows and ratios of `lamamba.benchmarking.throughput`, with aligned columns.

    The last columns say how many times as fast as each network the LaMamba networks are.
    """
    models = list(dict.fromkeys(ratio["model"] for ratio in ratios))
    cells: list[tuple[str, ...]] = [(*HEADINGS, *(f"{model}: times as fast" for model in models))]
    for row in rows:
        same = {
            ratio["model"]: ratio["ratio"] for ratio in ratios
            if ratio["peer"] == row["model"] and all(ratio[key] == row[key] for key in ("image_size", "batch", "mode"))
        }
        low, high = row["ms_quartiles"]
        peak, activations = row["peak_memory_bytes"], row["activation_bytes_per_image"]
        cells.append((
            row["model"], str(row["image_size"]), str(row["batch"]), f"{row['images_per_second']:.3g}",
            f"{row['ms']:.1f}", f"{low:.1f} - {high:.1f}", f"{peak / 2**20:.0f}" if peak is not None else "-",
            f"{activations / 2**20:.0f}" if activations is not None else "-",
            f"{row['multiply_adds'] / 1e9:.2f}", f"{row['multiply_adds_per_second'] / 1e9:.1f}",
            f"{row['share_of_product']:.0%}", *(f"{same[model]:.2f}" if model in same else "" for model in models),
        ))
    heading, *others = aligned(cells)
    rule = ["-" * (len(heading[0]) + 2), *("-" * (len(cell) + 1) + ":" for cell in heading[1:])]
    lines = ["| " + " | ".join(line) + " |" for line in (heading, *others)]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def explain(rows: list[dict[str, Any]], left_out: list[dict[str, Any]]) -> list[str]:
    """What is below a table: the large product, what was done for each network, and which were left out."""
    rates = [row["product_multiply_adds_per_second"] / 1e9 for row in rows]
    span = f"{min(rates):.1f}" if max(rates) - min(rates) < 0.05 else f"{min(rates):.1f} to {max(rates):.1f}"
    lines = [f"one large matrix product in the same turns: {span} G multiply-adds/s"]
    done: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        done.setdefault(PEERS[name].care if name in PEERS else OURS, []).append(name)
    lines += [f"{', '.join(names)}: {care}" for care, names in done.items()]
    if all(row["packed_weights"] for row in rows):
        lines.append("weights of all Linear layers are packed for oneDNN")
    return lines + [f"left out: {one['model']} at {one['image_size']} px {one['reason']}" for one in left_out]


def describe(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of device, versions, commit and back end, for the lines above a table."""
    settings, versions = environment["settings"], environment["versions"]
    backend = f"{settings['backend']}, {settings['threads']} threads{', compiled' if settings['compile'] else ''}"
    if settings["packed_weights"]:
        backend += ", weights packed for oneDNN"
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
