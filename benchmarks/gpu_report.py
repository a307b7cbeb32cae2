"""One table and one picture of what benchmarks/gpu.sh measured.

    python benchmarks/gpu_report.py [RESULTS.json]          RESULTS.md and RESULTS.png beside it

Whatever steps are in the file are shown; a step that failed or ended early shows what it had measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure

from lamamba.utils.files import write_atomically
from lamamba.viz.curves import OUR_COLOR, PEER_COLOR, save_figure, set_log, tidy

OURS, PEER = "xl", "dit-xl-2"
WAYS = ("eager", "compiled", "graphed")
LINES = {"eager": ":", "compiled": "--", "graphed": "-"}
SHOWN_KERNELS = 12


def network_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the networks that were timed."""
    rows = found["steps"].get("networks", {}).get("result", {}).get("rows", [])
    return [row for row in rows if "error" not in row]


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a pass or a step, and peak memory, as Markdown."""
    times = {(row["mode"], row["image_size"], row["network"], row["way"]): row for row in rows}
    lines = ["| | px | images | LaMamba-XL, ms: eager | compiled | graphed | DiT-XL/2, ms: eager | compiled | graphed "
             "| LaMamba is faster by | peak GiB: LaMamba | DiT |", "|" + "---|" * 12]
    groups = dict.fromkeys((row["mode"], row["image_size"], row["images"]) for row in rows)
    for mode, size, images in groups:
        names = WAYS if mode == "forward" else ("train", "train, compiled", "")
        ours, peers = ([times.get((mode, size, network, way)) for way in names] for network in (OURS, PEER))
        best = [min((row["ms"] for row in side if row), default=None) for side in (ours, peers)]
        cells = [f"{row['ms']:.1f}" if row else "" for row in (*ours, *peers)]
        ratio = f"{best[1] / best[0]:.2f}" if None not in best else ""
        memory = [min((row["peak_memory_bytes"] or 0 for row in side if row), default=None) for side in (ours, peers)]
        sizes = ["" if peak is None else f"{peak / 2**30:.1f}" for peak in memory]
        what = "forward" if mode == "forward" else "training step"
        lines.append(f"| {' | '.join([what, str(size), str(images), *cells, ratio, *sizes])} |")
    return "\n".join(lines)


def notes(found: dict[str, Any]) -> Iterator[str]:
    """Lines below the table: outcome of the steps, the scan beside its floor, the longest kernels."""
    for name, step in found["steps"].items():
        last = "" if step["verdict"] == "passed" else f": {(step['last_lines'] or [''])[-1]}"
        yield f"- {name}: {step['verdict']}, {step['seconds']:.0f} s{last}"
    for row in found["steps"].get("scan", {}).get("result", {}).get("rows", []):
        yield (f"- scan, {row['b']} x {row['l']} tokens, {row['c']} channels, n = {row['n']}, {row['pass']}: "
               f"{row['ms']:.3f} ms, {row['share_of_floor']:.0%} of its floor")
    for row in found["steps"].get("networks", {}).get("result", {}).get("rows", []):
        if "error" in row:
            yield f"- {row['network']}, {row['image_size']} px, {row.get('way', row['mode'])}: {row['error']}"
        for kernel in row.get("kernels", [])[:SHOWN_KERNELS]:
            yield (f"- kernel of {row['network']}, {row['image_size']} px, {row['way']}: {kernel['ms']:.2f} ms in "
                   f"{kernel['calls']:.0f} calls of `{kernel['kernel'][:90]}`")


def markdown(found: dict[str, Any]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {found['versions'].get(name)}" for name in ("torch", "triton", "diffusers"))
    head = f"# {found['device']}\n\n{found['date']}, commit {found['commit']}; {versions}; bfloat16\n"
    return "\n".join([head, table(network_rows(found)), "", *notes(found), ""])


def picture(found: dict[str, Any], path: Path) -> None:
    """Images a second by image size, and the shares of the longest kernels, as a PNG."""
    rows = network_rows(found)
    figure = Figure(figsize=(11, 4.5))
    speed, shares = figure.subplots(1, 2)
    for network, color, label in ((OURS, OUR_COLOR, "LaMamba-XL"), (PEER, PEER_COLOR, "DiT-XL/2")):
        for way in WAYS:
            points = sorted((row["image_size"], row["images_per_second"]) for row in rows
                            if (row["network"], row["way"]) == (network, way))
            if points:
                speed.plot(*zip(*points, strict=True), LINES[way], color=color, marker="o", label=f"{label}, {way}")
    speed.set_xlabel("image size in pixels")
    speed.set_ylabel("images/s, forward")
    if rows:
        set_log(speed)
        speed.set_xscale("log", base=2)
        speed.set_xticks(ticks := sorted({row["image_size"] for row in rows}), labels=[str(tick) for tick in ticks])
        speed.legend(fontsize=8)
    profiled = next((row for row in rows if row["network"] == OURS and row.get("kernels")), None)
    if profiled:
        longest = profiled["kernels"][:SHOWN_KERNELS][::-1]
        names, times = [kernel["kernel"][:40] for kernel in longest], [kernel["ms"] for kernel in longest]
        shares.barh(names, times, color=OUR_COLOR)
        shares.set_xlabel(f"ms of a pass, LaMamba-XL, {profiled['image_size']} px, {profiled['way']}")
        shares.tick_params(axis="y", labelsize=7)
    tidy([speed, shares])
    save_figure(figure, path)


def write_report(found: dict[str, Any], results: Path) -> None:
    """Write RESULTS.md and RESULTS.png beside RESULTS.json."""
    write_atomically(results.with_suffix(".md"), markdown(found))
    picture(found, results.with_suffix(".png"))


def main() -> None:
    default = Path(__file__).resolve().parent / "results" / "gpu.json"
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    found = json.loads(results.read_text(encoding="utf-8"))
    write_report(found, results)
    print(markdown(found))


if __name__ == "__main__":
    main()
