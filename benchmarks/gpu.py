"""The steps of benchmarks/gpu.sh, each in its own process with a time limit, with all results in one file."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

MODULES = (
    "torch", "triton", "numpy", "scipy", "matplotlib", "PIL", "tqdm", "safetensors", "huggingface_hub", "pytest",
    "typing_extensions", "typing_inspection", "annotated_types", "pydantic_core", "pydantic", "docstring_parser",
    "tyro", "diffusers",
)
"""What the steps import, besides what these import."""
GPU_TESTS = (
    "tests/ops/test_selective_scan_gpu.py", "tests/ops/test_layers_gpu.py", "tests/inference/test_cuda_graph.py",
)
TEST_PROCESSES = 6
INTERPRETER = {"TRITON_INTERPRET": "1", "LAMAMBA_BACKEND": "triton", "TORCH_COMPILE_DISABLE": "1"}
"""Of dry runs: kernels on CPU tensors, torch.compile as nothing."""


@dataclass(frozen=True)
class Step:
    """A process with a time limit."""

    command: list[str]
    limit: int
    """Seconds."""
    file: Path | None = None
    """JSON that it writes."""
    environment: dict[str, str] = field(default_factory=dict)


def missing_modules(names: tuple[str, ...] = MODULES) -> list[str]:
    """The modules that cannot be imported, without what they need themselves."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing.append(error.name or name)
    return list(dict.fromkeys(missing))


def steps(folder: Path, arch: int = 90, dry_run: bool = False) -> dict[str, Step]:
    """The steps by name. Their limits add up to less than 9 minutes; a dry run, interpreted, may take longer."""
    files = {name: folder / f"{name}.json" for name in ("compile", "scan", "layers", "networks")}
    interpreted = INTERPRETER if dry_run else {}

    def script(name: str, limit: int, *options: str, **environment: str) -> Step:
        key, tiny = name.removesuffix("_gpu").removeprefix("gpu_"), ["--dry-run"] if dry_run else []
        command = [sys.executable, f"benchmarks/{name}.py", "--json", str(files[key]), *options, *tiny]
        return Step(command, limit, files[key], {**interpreted, **environment})

    workers = ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") and not dry_run else []
    compile_options = ["--arch", str(arch), *(["--quick", "--launch", "modulated_norm"] if dry_run else [])]
    compiling = [sys.executable, "benchmarks/gpu_compile.py", "--json", str(files["compile"]), *compile_options]
    found = {
        "compile": Step(compiling, 75, files["compile"]),
        "tests": Step([sys.executable, "-m", "pytest", "-q", *workers, *GPU_TESTS], 110),
        "scan": script("scan_gpu", 40),
        "networks": script("networks_gpu", 270, LAMAMBA_BACKEND="torch" if dry_run else "auto",
                           TORCHINDUCTOR_COMPILE_THREADS="4"),
        "layers": script("layers_gpu", 35, "--seconds", "25"),
    }
    return {name: replace(step, limit=10 * step.limit) if dry_run else step for name, step in found.items()}


def run(step: Step) -> dict[str, Any]:
    """Run a step and show its output; return outcome, seconds, the last lines, and what it wrote."""
    began, lines = time.perf_counter(), []
    process = subprocess.Popen(
        ["timeout", "--kill-after=5", str(step.limit), *step.command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    verdict = "passed" if status == 0 else "too slow" if status in (124, 137) else "failed"
    outcome = {"verdict": verdict, "seconds": round(time.perf_counter() - began, 1), "last_lines": lines[-30:]}
    if step.file and step.file.exists():
        outcome["result"] = json.loads(step.file.read_text(encoding="utf-8"))
    return outcome


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Steps of benchmarks/gpu.sh")
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--only", nargs="*", help="some of the steps")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes and Triton's interpreter")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if missing := missing_modules():
        print(f"missing here: {', '.join(missing)}; benchmarks/gpu.sh says which wheels to carry: nothing was measured")
        return 2
    # they import what may be missing
    import torch
    from gpu_report import markdown, write_report

    from lamamba.benchmarking.environment import commit, device_name, versions
    from lamamba.utils.files import write_atomically

    arch = 90 if options.dry_run else int("".join(map(str, torch.cuda.get_device_capability())))
    found: dict[str, Any] = {
        "device": device_name("cpu" if options.dry_run else "cuda"), "versions": versions("triton", "diffusers"),
        "commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run, "steps": {},
    }
    print(f"{found['device']}, commit {found['commit']}", flush=True)
    options.results.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, step in steps(Path(folder), arch, options.dry_run).items():
            if options.only and name not in options.only:
                continue
            print(f"\n== {name} (at most {step.limit} s)", flush=True)
            found["steps"][name] = run(step)
            write_atomically(options.results, json.dumps(found, indent=1) + "\n")
            write_report(found, options.results)
    print(f"\n{markdown(found)}\nwrote {options.results}, its table (.md) and its picture (.png)")
    return 0 if all(outcome["verdict"] == "passed" for outcome in found["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
