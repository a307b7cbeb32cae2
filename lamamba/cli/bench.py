"""Time LaMamba presets beside DiT-S/2 to DiT-XL/2: same batch, precision and settings, in turns.

  lamamba bench --models xl --peers dit-xl-2 --image-sizes 256,512 --batch 8 --json bench.json
  lamamba bench --models xl --peers dit-xl-2 --image-sizes 256,512,1024 --batch 8,1,1 --dtype bfloat16
  lamamba bench --models s --peers dit-s-2 --mode train --image-sizes 256 --batch 16
  lamamba bench --models s --peers dit-s-2 --image-sizes 256,512,1024,2048 --batch 1 --plot cost.png

DiT is diffusers' DiTTransformer2DModel with one embedder for all blocks (675 M parameters for XL/2). Every network has
a process of its own; on Linux CPUs these start with the same MALLOC_ settings. On CPUs bfloat16 weights of both are
packed for oneDNN. Times are medians with quartiles. Peak memory is that of the GPU's allocator, or what the process
occupies more than before the network was built; "MiB an image" is the peak less weights (in training, gradients and
moments, too), divided by the batch. A training step in bfloat16 has float32 weights and runs under autocast."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.benchmark import BenchmarkOptions


def main(arguments: list[str]) -> None:
    options = parse(BenchmarkOptions, arguments, "bench", __doc__)

    from lamamba.api.benchmark import benchmark

    print(benchmark(options))
