"""lamamba evaluate: FID and its kin, with the protocol written beside every figure."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.evaluation import CompareArguments, EvaluateArguments, StatsArguments

DESCRIPTION = """Judge samples beside a reference: FID, sFID, Inception Score, precision and recall, density and
coverage, KID.

  lamamba evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz
  lamamba evaluate runs/xl --reference VIRTUAL_imagenet256_labeled.npz --guidance 1.5 --repeats 3
  torchrun --nproc-per-node 8 -m lamamba evaluate runs/xl --reference imagenet.npz       the same figures, sooner
  lamamba evaluate shipped --reference digits --features digits --num-images 2000 --guidance 1,1.5,2
  lamamba evaluate runs/digits --reference digits --features digits --num-images 2000 --every-checkpoint
  lamamba evaluate stats imagenet/val --out imagenet.npz       a reference, once; ADM's names, nothing pickled
  lamamba evaluate compare a.json b.json                       side by side, or refused with the reason

SAMPLES is a folder of images, an npz file with arr_0, "digits", or a run, a checkpoint or a model ("shipped": the one
that comes with the package), which then samples while it is judged: images are never kept. REFERENCE is an npz file
of ADM's kind, one made by `stats`, a folder, or "digits". The result file holds every figure and the whole protocol.
Features are kept by shard beside it until the end: when the command is killed, the same command goes on where it was.

Feature networks: inception (FID as published; the weights are downloaded once, or named with --weights), dinov2
(FD-DINOv2; needs transformers), digits (part of the package), or module:name for a function of your own from uint8
images (n, h, w, 3) to features (n, d)."""


STATS_DESCRIPTION = """Save the statistics of reference images for `lamamba evaluate --reference`.

  lamamba evaluate stats imagenet/val --out imagenet.npz
  lamamba evaluate stats digits --features digits --image-size 16 --out digits.npz"""


COMPARE_DESCRIPTION = """Put results side by side, or refuse: figures of different feature networks, references, counts
or sizes say nothing about each other.

  lamamba evaluate compare a.json b.json"""


def main(arguments: list[str]) -> None:
    task, *rest = arguments or ["--help"]
    if task == "compare":
        compare(parse(CompareArguments, rest, "evaluate compare", COMPARE_DESCRIPTION))
    elif task == "stats":
        wanted = _checked(parse(StatsArguments, rest, "evaluate stats", STATS_DESCRIPTION))
        from lamamba.api.evaluate import save_statistics

        save_statistics(wanted)
    else:
        chosen = _checked(parse(EvaluateArguments, arguments, "evaluate", DESCRIPTION))
        from lamamba.api.evaluate import evaluate

        evaluate(chosen)


def _checked(chosen):
    for name in ("repeats", "batch_size", "shard_size", "rows"):
        if getattr(chosen, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(chosen, name)} must be at least 1")
    return chosen


def compare(chosen: CompareArguments) -> None:
    """Print a table of results that may stand side by side.

    Raises:
        ValueError: naming what they disagree in.
    """
    from lamamba.evaluation.results import differences, disagreements, read_result, table

    if len(chosen.results) < 2:
        raise ValueError("name at least two result files, as in lamamba evaluate compare a.json b.json")
    entries = []
    for path in chosen.results:
        result = read_result(path)["entries"]
        entries += [{**entry, "name": path.stem + (f" {entry['name']}" if len(result) > 1 else "")} for entry in result]
    first = entries[0]
    for entry in entries[1:]:
        if reasons := disagreements(first["protocol"], entry["protocol"]):
            names = f"{first['name']} and {entry['name']}"
            raise ValueError(f"{names} cannot be compared: they differ in {'; '.join(reasons)}")
    print(table(entries))
    for entry in entries[1:]:
        if found := differences(first["protocol"], entry["protocol"]):
            print(f"\n{first['name']} | {entry['name']}")
            print("\n".join(f"  {line}" for line in found))
