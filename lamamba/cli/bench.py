"""Time LaMamba presets beside the systems of the paper's tables: same batch, precision and settings, in turns.

  lamamba bench --models xl --peers dit-xl-2 --image-sizes 256,512 --batch 8 --json bench.json
  lamamba bench --models xl,l --peers all --image-sizes 256 --batch 1 --json all.json --plot-efficiency all.png
  lamamba bench --models xl --peers dit-xl-2 --image-sizes 256,512,1024 --batch 8,1,1 --dtype bfloat16
  lamamba bench --models s --peers dit-s-2 --mode train --image-sizes 256 --batch 16
  lamamba bench --models s --peers dit-s-2 --image-sizes 256,512,1024,2048 --batch 1 --plot cost.png

  networks        ADM, LDM and DiT are diffusers', U-ViT, DiS and DiM small ones after their papers, each with its exact
                  count (lamamba info --compare).
  same care       All use scaled_dot_product_attention, DiS and DiM our selective scan; convolutions have their channels
                  last; on CPUs weights of Linear layers and convolutions are packed for oneDNN.
  processes       Every network has its own; on Linux CPUs these start with the same MALLOC_ settings. Where not all
                  fit into memory together, LaMamba takes turns with one peer after the other, so that it is timed
                  beside each; what does not fit alone is left out and named.
  training        In bfloat16, a training step has float32 weights and runs under autocast.

  ms a pass       Median, with quartiles.
  peak MiB        Of the GPU's allocator, or what the process occupies more than before the network was built.
  MiB an image    The peak less weights (in training, gradients and moments, too), divided by the batch.
  of a product    Multiply-adds a second as a share of one large matrix product's, timed in the same turns; a training
                  step counts as three forward passes.
  times as fast   As each peer, both timed in the same turns."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.benchmark import BenchmarkOptions


def main(arguments: list[str]) -> None:
    options = parse(BenchmarkOptions, arguments, "bench", __doc__)

    from lamamba.api.benchmark import benchmark

    print(benchmark(options))
