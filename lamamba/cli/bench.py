"""lamamba bench: LaMamba and DiT side by side on this machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lamamba._version import __version__
from lamamba.cli.parse import parse
from lamamba.config import unknown_name

if TYPE_CHECKING:
    from lamamba.benchmarking.throughput import Case

DESCRIPTION = """Time LaMamba presets beside DiT-S/2 to DiT-XL/2: same batch, precision and settings, in turns.

  lamamba bench --models xl --peers dit-xl-2 --image-sizes 256,512 --batch 8 --json bench.json
  lamamba bench --models xl --peers dit-xl-2 --image-sizes 256,512,1024 --batch 8,1,1 --dtype bfloat16
  lamamba bench --models s --peers dit-s-2 --mode train --image-sizes 256 --batch 16
  lamamba bench --models s --peers dit-s-2 --image-sizes 256,512,1024,2048 --batch 1 --plot cost.png

DiT is diffusers' DiTTransformer2DModel with one embedder for all blocks (675 M parameters for XL/2). Every network has
a process of its own; on Linux CPUs these start with the same MALLOC_ settings. On CPUs bfloat16 weights of both are
packed for oneDNN. Times are medians with quartiles. Peak memory is that of the GPU's allocator, or what the process
occupies more than before the network was built; "MiB an image" is the peak less weights (in training, gradients and
moments, too), divided by the batch. A training step in bfloat16 has float32 weights and runs under autocast."""

DTYPES = ("float32", "bfloat16", "float16")
PLOTTED_SIZES = (256, 512, 1024, 2048)
"""Image sizes whose multiply-adds are drawn; those that were timed come on top."""
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    models: str = "xl"
    """Presets (s, b, l, xl), separated by commas; xl-n16 has 16 states."""
    peers: str = "dit-xl-2"
    """dit-s-2, dit-b-2, dit-l-2, dit-xl-2, separated by commas, or "none"."""
    image_sizes: str = "256"
    """Sides of the images in pixels, separated by commas."""
    batch: str = "8"
    """Images in a batch: one number for all sizes, or one for each, separated by commas."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device such as cpu or cuda:1."""
    mode: Literal["forward", "train"] = "forward"
    """A forward pass, or a training step: forward, backward, AdamW, nothing recomputed."""
    state_size: int = 1
    """Numbers of memory per channel of LaMamba's scan, where a model's name does not say."""
    compile: bool = False
    """Compile all networks with torch.compile (on CPUs it needs a C++ compiler)."""
    seconds: float = 60
    """How long each network is timed at each size; at least three passes all the same."""
    processes: Literal["auto", "together", "apart"] = "auto"
    """Networks in memory together, taking turns pass by pass, or loaded one after the other, twice over."""
    threads: int | None = None
    """CPU threads of each network; by default torch's choice."""
    pack: bool = True
    """Pack bfloat16 weights for oneDNN on CPUs, for both sides."""
    json: Path | None = None
    """Write rows, ratios and environment to this file, after every size."""
    markdown: Path | None = None
    """Write the table to this file."""
    plot: Path | None = None
    """Draw time and multiply-adds against the number of tokens into this PNG."""


def main(arguments: list[str]) -> None:
    chosen = parse(BenchArguments, arguments, "bench", DESCRIPTION)
    for path in (chosen.json, chosen.markdown, chosen.plot):
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: the folder {path.resolve().parent} does not exist; make it first")
    groups = _plan(chosen)

    from rich.console import Console

    from lamamba.benchmarking.throughput import measure, ratios
    from lamamba.utils.files import write_atomically

    facts = environment(groups[0][0], chosen)
    print("\n".join(f"{key:<12}{value}" for key, value in _described(facts)), flush=True)
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for cases in groups:
        with console.status("starting") as status:
            rows += measure(cases, seconds=chosen.seconds, processes=chosen.processes, on_progress=status.update)
        if chosen.json:
            result = {"version": VERSION, "rows": rows, "ratios": ratios(rows), "environment": facts}
            write_atomically(chosen.json, json.dumps(result, indent=2) + "\n")
        if not console.is_terminal and len(groups) > 1:
            print(f"{cases[0].image_size} px: done", flush=True)
    text = table(rows, ratios(rows))
    print(f"\n{text}")
    if chosen.markdown:
        lines = "\n".join(f"- {key}: {value}" for key, value in _described(facts))
        what = "training step" if chosen.mode == "train" else "forward pass"
        write_atomically(chosen.markdown, f"# LaMamba beside DiT: {what}, {chosen.dtype}\n\n{lines}\n\n{text}\n")
    if chosen.plot:
        from lamamba.viz.curves import cost_curves

        cost_curves(rows, _curves(groups), chosen.plot)
    for path in (chosen.json, chosen.markdown, chosen.plot):
        if path:
            print(f"wrote {path}")


def _plan(chosen: BenchArguments) -> list[list[Case]]:
    """For each image size, the networks that are timed in turns; everything checked before anything is built."""
    sizes = _numbers(chosen.image_sizes, "--image-sizes")
    batches = _numbers(chosen.batch, "--batch")
    if len(batches) == 1:
        batches *= len(sizes)
    if len(batches) != len(sizes):
        raise ValueError(f"--batch has {len(batches)} numbers for {len(sizes)} image sizes; give one, or one for each")
    if chosen.dtype not in DTYPES:
        raise unknown_name("dtype", chosen.dtype, DTYPES)
    for option, value in (("--state-size", chosen.state_size), ("--threads", chosen.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} must be at least 1")
    if chosen.seconds < 0:
        raise ValueError(f"--seconds {chosen.seconds:g} must not be negative")

    from lamamba.benchmarking.peers import find_peer
    from lamamba.benchmarking.throughput import Case, parse_model
    from lamamba.utils.distributed import pick_device

    models = [name.strip() for name in chosen.models.split(",")]
    peers = [] if chosen.peers == "none" else [name.strip() for name in chosen.peers.split(",")]
    for name in peers:
        find_peer(name)
    for name in models:
        for size in sizes:
            parse_model(name, size, chosen.state_size)
    if chosen.state_size > 1:
        models = [name if "-n" in name else f"{name}-n{chosen.state_size}" for name in models]
    picked = pick_device(chosen.device)
    device = "cpu" if picked.type == "cpu" else str(picked)
    return [
        [
            Case(name, size, batch, chosen.dtype, device, chosen.mode, chosen.compile, chosen.threads, chosen.pack)
            for name in (*models, *peers)
        ]
        for size, batch in zip(sizes, batches, strict=True)
    ]


def _numbers(text: str, option: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} is not a list of whole numbers, as in 256,512") from None
    if min(values) < 1:
        raise ValueError(f"{option} {text!r}: every number must be at least 1")
    return values


def environment(case: Case, chosen: BenchArguments) -> dict[str, Any]:
    """Where and how the numbers were made."""
    import diffusers
    import torch

    from lamamba.benchmarking.throughput import MALLOC, parse_model
    from lamamba.ops.selective_scan import OP

    device, is_cpu = torch.device(case.device), case.device == "cpu"
    x = torch.empty(0, device=device, dtype=getattr(torch, case.dtype))
    states = parse_model(chosen.models.split(",")[0].strip(), case.image_size, chosen.state_size).state_size
    return {
        "device": device_name(case.device),
        "versions": {
            "lamamba": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "diffusers": diffusers.__version__, "triton": version_of("triton"), "cuda": torch.version.cuda,
            "system": platform.platform(),
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "backend": OP.choose(x, states), "threads": chosen.threads or torch.get_num_threads(),
            "compile": chosen.compile, "seconds": chosen.seconds, "processes": chosen.processes,
            "packed_weights": case.packs_weights, "attention": "scaled_dot_product_attention",
            "malloc": MALLOC if is_cpu and sys.platform == "linux" else None,
            "tf32": None if is_cpu else torch.backends.cuda.matmul.allow_tf32,
            "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("LAMAMBA_")},
        },
    }


def _described(facts: dict[str, Any]) -> list[tuple[str, str]]:
    settings, versions = facts["settings"], facts["versions"]
    backend = f"{settings['backend']}, {settings['threads']} threads{', compiled' if settings['compile'] else ''}"
    if settings["packed_weights"]:
        backend += ", bfloat16 weights packed for oneDNN"
    shown = [name for name in ("lamamba", "torch", "diffusers", "triton") if versions[name]]
    found = ", ".join(f"{name} {versions[name]}" for name in shown)
    lines = [("device", facts["device"]), ("versions", found), ("commit", f"{facts['commit']}, {facts['date']}"),
             ("scan", backend)]
    if settings["malloc"]:
        lines.append(("malloc", "networks run in processes started with " + " ".join(
            f"{name}={value}" for name, value in settings["malloc"].items()
        )))
    return lines


def device_name(device: str) -> str:
    """The maker's name of a GPU or processor."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} CPUs, {_capability()})"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} CPUs, {_capability()})"


def _capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that this code lies in, "-dirty" with changes that are in none; None outside one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return os.environ.get("LAMAMBA_COMMIT")
    try:
        return subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


HEADINGS = (
    "network", "px", "batch", "images/s", "ms a pass", "quartiles", "peak MiB", "MiB an image", "G multiply-adds",
    "LaMamba / DiT",
)


def table(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table that is as easy to read on a terminal."""
    cells = [HEADINGS]
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
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = ["| " + " | ".join(
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ) + " |" for line in cells]
    rule = "|" + "|".join(
        "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":" for column, width in enumerate(widths)
    ) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _curves(groups: list[list[Case]]) -> dict[str, list[tuple[int, int]]]:
    """(image size, multiply-adds) of each network that was timed, at its sizes and at some more."""
    from lamamba.benchmarking.throughput import multiply_adds

    sizes = sorted({*PLOTTED_SIZES, *(cases[0].image_size for cases in groups)})
    return {case.model: [(size, multiply_adds(case.model, size)) for size in sizes] for case in groups[0]}
