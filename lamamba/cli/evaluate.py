"""Evaluate samples against a reference: FID, sFID, Inception Score, precision and recall, density and
coverage, KID.

  lamamba evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz
  lamamba evaluate runs/xl --reference VIRTUAL_imagenet256_labeled.npz --guidance 1.5 --repeats 3
  torchrun --nproc-per-node 8 -m lamamba evaluate runs/xl --reference imagenet.npz       the same figures, sooner
  lamamba evaluate shipped --reference digits --features digits --num-images 2000 --guidance 1,1.5,2
  lamamba evaluate runs/digits --reference digits --features digits --num-images 2000 --every-checkpoint
  lamamba evaluate stats imagenet/val --out imagenet.npz       a reference, once; ADM's names, nothing pickled
  lamamba evaluate compare a.json b.json                       side by side, or refused with the reason

SAMPLES is a folder of images, an npz file with arr_0, "digits", or a run, a checkpoint or a model ("shipped": the one
that comes with the package), which samples while it is evaluated: images are never kept. It samples at guidance 1, the
protocol of published figures, unless --guidance says otherwise. REFERENCE is an npz file of ADM's kind, one made by
`stats`, a folder, or "digits". The result file holds every figure and the whole protocol. Features are kept by shard
beside it until the end: when the command is killed, the same command goes on where it was.

Feature networks: inception (FID as published; the weights are downloaded once, or named with --weights), dinov2
(FD-DINOv2; needs transformers), digits (part of the package), or module:function of your own, from uint8 images
(n, h, w, 3) to features (n, d): features:mine is the function mine of features.py in the current folder."""

from __future__ import annotations

from lamamba.cli.parse import parse, show
from lamamba.options.evaluation import CompareOptions, EvaluateOptions, StatisticsOptions

STATISTICS_DESCRIPTION = """Save the statistics of reference images for `lamamba evaluate --reference`.

  lamamba evaluate stats imagenet/val --out imagenet.npz
  lamamba evaluate stats photos/ --image-size 64 --out photos.npz       cropped as training crops them
  lamamba evaluate stats digits --features digits --image-size 16 --out digits.npz"""

COMPARE_DESCRIPTION = """Put results side by side, or refuse: figures of different feature networks, references, counts
or sizes say nothing about each other.

  lamamba evaluate compare a.json b.json"""


def main(arguments: list[str]) -> None:
    task, *rest = arguments or ["--help"]
    if task == "compare":
        compare_options = parse(CompareOptions, rest, "evaluate compare", COMPARE_DESCRIPTION)
        from lamamba.api.compare import compare

        print(compare(compare_options))
        return
    options = parse(
        StatisticsOptions, rest, "evaluate stats", STATISTICS_DESCRIPTION
    ) if task == "stats" else parse(EvaluateOptions, arguments or ["--help"], "evaluate", __doc__)

    from lamamba.api.compute_statistics import compute_statistics
    from lamamba.api.evaluate import evaluate

    show(evaluate(options) if isinstance(options, EvaluateOptions) else compute_statistics(options))
