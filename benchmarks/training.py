"""Images per second of lamamba train on one and on several processes: python benchmarks/training.py [--out FILE.json]

Trains the S network at 256 pixels on latents of random numbers, by the command line and under torchrun as a user
would, a few steps for each way: one process with one thread, one with all cores, then as many processes as there are
cores, each with one thread, as DDP and split by FSDP2. The batch is the same throughout. The rate is the median over
logged steps, without the first. Sample grids and held-out images are off; one checkpoint is written at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch
from latents import write_latents

from lamamba.benchmarking.environment import device_name


def measure(folder: Path, options: list[str], processes: int, threads: int) -> dict[str, float]:
    """Train; images per second and the largest process's peak memory in bytes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = torchrun if processes > 1 else []
    out = folder / f"run_{len(list(folder.glob('run_*')))}"
    command = [sys.executable, *launcher, "-m", "lamamba", "train", "s_256", *options, "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    return {
        "images_per_second": round(statistics.median(line["images_per_second"] for line in lines), 2),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines), "loss": lines[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_latents(folder / "latents", 1000)
        common = [
            "--data.source", str(folder / "latents"), "--data.expected-images", "1000", "--steps", str(chosen.steps),
            "--batch-size", str(chosen.batch), "--log-every", "1", "--sampling.every", "0",
            "--processes.data-workers", "0",
        ]
        ways = {
            "1 process, 1 thread": ([], 1, 1), f"1 process, {cores} threads": ([], 1, cores),
            f"{cores} processes, 1 thread each, DDP": ([], cores, 1),
            f"{cores} processes, 1 thread each, FSDP2": (["--processes.sharding", "full"], cores, 1),
        }
        if cores == 1:
            ways = {name: way for name, way in ways.items() if way[1:] == (1, 1)}
        found = {}
        for name, (options, processes, threads) in ways.items():
            found[name] = measure(folder, [*common, *options], processes, threads)
            row = found[name]
            memory = row["peak_memory_bytes"] / 2**30
            print(f"{name:<36}{row['images_per_second']:>8.2f} images/s  {memory:>6.2f} GiB a process  "
                  f"loss {row['loss']:.5f}", flush=True)
    if chosen.out:
        facts = {
            "device": device_name("cpu"), "torch": torch.__version__, "model": "s", "image_size": 256,
            "batch": chosen.batch, "steps": chosen.steps, "ways": found,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        chosen.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
