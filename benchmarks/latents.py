"""How many latents per second one process reads for training: python benchmarks/latents.py [--out FILE.json]

Makes a folder of latents as lamamba encode writes them (random numbers instead of an autoencoder's: the bytes do not
matter), of 4 x 32 x 32 numbers with mean, deviation and mirror image in float16, and reads it in the shuffled order of
training, from the system's disk cache. "moments": bytes to memory. "x0": with the draw from the posterior, its noise
given. "batch": with all random numbers of a sample, as the training loop gets it, in one thread and in several.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lamamba.benchmarking.environment import device_name
from lamamba.data.codec import CodecConfig
from lamamba.data.latents import INDEX, MOMENTS, Index, LatentSet, Plan, Shard, shard_name
from lamamba.data.sets import read_ahead
from lamamba.training.draws import Draws, draw, image_indices
from lamamba.utils.files import sha256, write_json

SHAPE = (4, 32, 32)


def write_latents(folder: Path, images: int, shard_size: int = 1024) -> None:
    """Shards of random moments, and their index."""
    plan = Plan(
        source="random numbers", source_fingerprint="", images=images, image_size=256, crop="centre", views=2, parts=2,
        shape=SHAPE, storage="float16", codec=CodecConfig(codec="latents", scale=0.18215), compute="float32",
        batch_size=1, threads=1, shard_size=shard_size, label_names=tuple(map(str, range(1000))),
    )
    folder.mkdir(parents=True)
    generator, shards = torch.Generator().manual_seed(0), []
    for number in range(plan.num_shards):
        count = len(plan.shard_range(number))
        moments = torch.randn(count, 2, 2, *SHAPE, generator=generator).half()
        path = folder / shard_name(number)
        save_file({MOMENTS: moments}, path)
        labels = tuple(index % 1000 for index in plan.shard_range(number))
        shards.append(Shard(
            file=path.name, bytes=path.stat().st_size, sha256=sha256(path), labels=labels,
            files=tuple(map(str, labels)), excluded={},
        ))
    write_json(folder / INDEX, Index(plan, tuple(shards)).to_dict())


def rate(work: Callable[[], int], repeats: int) -> float:
    """Samples per second, the best of some runs."""
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        count = work()
        best = max(best, count / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)                                                    # in each thread that reads
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "latents"
        write_latents(folder, chosen.images)
        data = LatentSet(folder, mirror=True)
        starts = range(0, chosen.images - chosen.batch + 1, chosen.batch)
        batches = [range(start, start + chosen.batch) for start in starts]
        indices = {places: image_indices(0, places, len(data)) for places in batches}
        given = draw(0, batches[0], SHAPE, latent=True)

        def batch(places: range) -> tuple[torch.Tensor, Draws]:
            draws = draw(0, places, SHAPE, latent=True)
            return data.read(image_indices(0, places, len(data)), draws)[0], draws

        def ahead(threads: int) -> int:
            return sum(len(x0) for x0, _ in read_ahead(batch, batches, threads=threads))

        works: dict[str, Callable[[], int]] = {
            "moments, 1 thread": lambda: sum(len(data.moments(indices[p], given.mirror)) for p in batches),
            "x0, 1 thread": lambda: sum(len(data.read(indices[p], given)[0]) for p in batches),
            "batch, 1 thread": lambda: sum(len(batch(p)[0]) for p in batches),
            "batch, 2 threads": lambda: ahead(2),
            "batch, 4 threads": lambda: ahead(4),
        }
        works["moments, 1 thread"]()                                            # into the disk cache
        rates = {name: round(rate(work, chosen.repeats)) for name, work in works.items()}
    bytes_each = 2 * 2 * int(np.prod(SHAPE))
    print(f"{chosen.images} images of {' x '.join(map(str, SHAPE))}, batches of {chosen.batch}")
    for name, value in rates.items():
        print(f"{name:<20}{value:>8,} latents/s  {value * bytes_each / 2**20:>8,.0f} MiB/s")
    if chosen.out:
        facts = {
            "images": chosen.images, "batch": chosen.batch, "latents_per_second": rates, "torch": torch.__version__,
            "device": device_name("cpu"), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        chosen.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
