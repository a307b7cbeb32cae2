"""Time and memory of the figures of 50,000 samples, without the features, beside a straightforward implementation.

    OMP_NUM_THREADS=2 python benchmarks/evaluation.py --out benchmarks/results/evaluation-cpu.json

Features are synthetic, similar to Inception's pool3: 2048 of them, not negative, correlated. Each implementation runs
in a process of its own, whose peak memory is the system's count, and both must agree. The straightforward one is
np.cov, scipy.linalg.sqrtm, and whole rows of distances in float32 with np.partition, 2,000 rows at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

K = 3


def make_features(count: int, size: int, seed: int) -> np.ndarray:
    """(count, size) float32: 64 common factors and noise of each feature, cut off below 0."""
    factors = np.random.default_rng(0).standard_normal((64, size), dtype=np.float32) * 0.12
    draws, features = np.random.default_rng(seed), np.empty((count, size), dtype=np.float32)
    for start in range(0, count, 5000):
        rows = min(5000, count - start)
        part = draws.standard_normal((rows, 64), dtype=np.float32) @ factors
        part += 0.3 * draws.standard_normal((rows, size), dtype=np.float32) + 0.1 + 0.01 * seed
        np.maximum(part, 0, out=features[start : start + rows])
    return features


def ours(reference: np.ndarray, samples: np.ndarray, clock: Any) -> dict[str, float]:
    from lamamba.metrics import Statistics, frechet_distance, precision_recall

    one, two = (Statistics(side.shape[1]).add(side) for side in (reference, samples))
    moments = (one.mean, one.covariance(), two.mean, two.covariance())
    clock("statistics")
    frechet = frechet_distance(*moments)
    clock("frechet")
    precision, recall = precision_recall(reference, samples, K)
    clock("precision and recall")
    return {"frechet": frechet, "precision": precision, "recall": recall}


def straightforward(reference: np.ndarray, samples: np.ndarray, clock: Any) -> dict[str, float]:
    from scipy.linalg import sqrtm

    mu1, mu2 = reference.mean(axis=0, dtype=np.float64), samples.mean(axis=0, dtype=np.float64)
    sigma1, sigma2 = (np.cov(side.astype(np.float64), rowvar=False) for side in (reference, samples))
    clock("statistics")
    frechet = float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * sqrtm(sigma1 @ sigma2).real))
    clock("frechet")

    def rows_of(a: np.ndarray, b: np.ndarray):
        squares = (b**2).sum(axis=1)
        for start in range(0, len(a), 2000):
            part = a[start : start + 2000]
            yield slice(start, start + len(part)), (part**2).sum(axis=1)[:, None] + squares - 2 * part @ b.T

    def reach(side: np.ndarray) -> np.ndarray:
        found = np.empty(len(side), dtype=np.float32)
        for rows, distances in rows_of(side, side):
            found[rows] = np.partition(distances, K, axis=1)[:, K]               # itself is the nearest
        return found

    real, fake = reach(reference), reach(samples)
    hits, recalled = 0, np.zeros(len(reference), dtype=bool)
    for rows, distances in rows_of(samples, reference):
        hits += int((distances <= real).any(axis=1).sum())
        recalled |= (distances <= fake[rows][:, None]).any(axis=0)
    clock("precision and recall")
    return {"frechet": frechet, "precision": hits / len(samples), "recall": float(recalled.mean())}


def measure(way: str, counts: tuple[int, int], size: int, pipe: Any) -> None:
    """In a process of its own: figures, seconds of each part, peak memory."""
    reference, samples = (make_features(count, size, seed) for seed, count in enumerate(counts))
    seconds, last, busy = {}, time.perf_counter(), time.process_time()

    def clock(part: str) -> None:
        nonlocal last
        seconds[part], last = round(time.perf_counter() - last, 2), time.perf_counter()

    figures = {"ours": ours, "straightforward": straightforward}[way](reference, samples, clock)
    busy = time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send({
        "figures": figures, "seconds": seconds, "total": round(sum(seconds.values()), 2),
        "processor_seconds": round(busy, 1),                                    # of all threads: tells a busy machine
        "peak_gib": round(peak / 2**30, 2),
        "features_gib": round((reference.nbytes + samples.nbytes) / 2**30, 2),
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--ways", default="ours,straightforward")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.processor())
    result: dict[str, Any] = {
        "samples": chosen.samples, "reference": chosen.reference, "size": chosen.size, "processor": processor,
        "load": round(os.getloadavg()[0], 1), "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "numpy": np.__version__,
    }
    for way in chosen.ways.split(","):
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(way, (chosen.reference, chosen.samples), chosen.size, there)
        )
        process.start()
        there.close()
        result[way] = here.recv()
        process.join()
        print(way, json.dumps(result[way], indent=2), flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
