"""The steps of benchmarks/gpu.sh, each in its own process with a time limit, with all results in one file."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lamamba.api.doctor import doctor
from lamamba.benchmarking.environment import commit
from lamamba.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent

LAMAMBA = [sys.executable, "-m", "lamamba"]
BENCH = [*LAMAMBA, "bench", "--models", "xl", "--peers", "dit-xl-2", "--dtype", "bfloat16", "--device", "cuda"]
CPU_LOSS = ROOT / "benchmarks" / "results" / "digits-cpu.json"
TRAINING_SECONDS = 120


def steps(folder: Path) -> dict[str, tuple[list[str], int, Path | None]]:
    """name: command, time limit in seconds, and the file that it writes. The limits add up to 9 minutes."""
    files = {name: folder / f"{name}.json" for name in ("scan", "layers", "forward", "train", "digits")}
    return {
        "tests": ([sys.executable, "-m", "pytest", "-q", "-x", "tests/ops/test_selective_scan_gpu.py",
                   "tests/ops/test_layers_gpu.py", "tests/inference/test_cuda_graph.py"], 130, None),
        "scan": ([sys.executable, "benchmarks/scan_gpu.py", "--json", str(files["scan"])], 50, files["scan"]),
        "layers": (
            [sys.executable, "benchmarks/layers_gpu.py", "--seconds", "40", "--json", str(files["layers"])],
            60, files["layers"],
        ),
        "forward": (
            [*BENCH, "--image-sizes", "256,512,1024", "--batch", "64,16,4", "--seconds", "3",
             "--json", str(files["forward"])],
            95, files["forward"],
        ),
        "train": (
            [*BENCH, "--image-sizes", "256", "--batch", "32", "--mode", "train", "--seconds", "4",
             "--json", str(files["train"])],
            50, files["train"],
        ),
        "digits": (
            [sys.executable, "benchmarks/train_digits.py", "--device", "cuda", "--dtype", "bfloat16",
             "--seconds", str(TRAINING_SECONDS), "--against", str(CPU_LOSS), "--json", str(files["digits"])],
            TRAINING_SECONDS + 25, files["digits"],
        ),
    }


def run(command: list[str], limit: int) -> dict[str, Any]:
    """Run a step and show its output; return outcome, seconds and the last lines."""
    began, lines = time.perf_counter(), []
    process = subprocess.Popen(
        ["timeout", "--kill-after=5", str(limit), *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    verdict = "passed" if status == 0 else "too slow" if status in (124, 137) else "failed"
    return {"verdict": verdict, "seconds": round(time.perf_counter() - began, 1), "last_lines": lines[-30:]}


def main() -> int:
    parser = argparse.ArgumentParser(description="Steps of benchmarks/gpu.sh")
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--only", nargs="*", help="some of the steps")
    options = parser.parse_args()

    findings = doctor().to_dict()
    found: dict[str, Any] = {
        "device": findings["devices"]["cuda:0"], "versions": findings["versions"], "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "doctor": findings, "steps": {},
    }
    print(f"{found['device']}, commit {found['commit']}", flush=True)
    options.results.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (command, limit, file) in steps(Path(folder)).items():
            if options.only and name not in options.only:
                continue
            print(f"\n== {name} (at most {limit} s)", flush=True)
            outcome = run(command, limit)
            if file and file.exists():
                outcome["result"] = json.loads(file.read_text(encoding="utf-8"))
            found["steps"][name] = outcome
            write_atomically(options.results, json.dumps(found, indent=2) + "\n")
    print()
    for name, outcome in found["steps"].items():
        print(f"{name:<8} {outcome['verdict']:<9} {outcome['seconds']:6.0f} s")
    print(f"wrote {options.results}")
    return 0 if all(outcome["verdict"] == "passed" for outcome in found["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
