"""The environment of a measurement: device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lamamba.benchmarking.throughput import MALLOC, Case, Processes, parse_model
from lamamba.ops.selective_scan import OP
from lamamba.utils.versions import package_versions


def device_name(device: str) -> str:
    """Model name of a GPU or processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()})"


def versions(*packages: str) -> dict[str, str | None]:
    """Of lamamba, Python, torch, CUDA, packages and the system."""
    return {**package_versions("torch", *packages), "cuda": torch.version.cuda, "system": platform.platform()}


def variables() -> dict[str, str]:
    """Environment variables of ours that are set."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("LAMAMBA_")}


def commit() -> str | None:
    """Commit of this checkout, with "-dirty" for uncommitted changes; None outside of a checkout.

    Without a .git folder, the variable LAMAMBA_COMMIT may name it.
    """
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


def environment(case: Case, *, seconds: float, processes: Processes) -> dict[str, Any]:
    """Device, versions, commit, date and settings of a benchmark, as plain values.

    Args:
        case: a LaMamba network that is timed.
        seconds, processes: as for `lamamba.benchmarking.throughput.measure`.
    """
    is_cpu = case.device == "cpu"
    x = torch.empty(0, device=case.device, dtype=getattr(torch, case.dtype))
    state_size = parse_model(case.model, case.image_size).state_size
    return {
        "device": device_name(case.device),
        "versions": versions("diffusers", "triton"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "backend": OP.choose(x, state_size), "threads": case.threads or torch.get_num_threads(),
            "compile": case.compile, "seconds": seconds, "processes": processes,
            "packed_weights": case.packs_weights, "attention": "scaled_dot_product_attention",
            "malloc": MALLOC if is_cpu and sys.platform == "linux" else None,
            "tf32": None if is_cpu else torch.backends.cuda.matmul.allow_tf32,
            "variables": variables(),
        },
    }
