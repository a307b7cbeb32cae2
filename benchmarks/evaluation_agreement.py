"""How far our figures are from torch-fidelity's, pytorch-fid's and SciPy's on the same features; prints a table.

    python benchmarks/evaluation_agreement.py

Needs SciPy, and the two packages or LAMAMBA_EVALUATORS (see tests/metrics/peers.py); neither is imported as a whole.
Features are synthetic (`benchmarks/evaluation.py`); the Inception network gets random weights.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation import make_features

from lamamba.metrics import Statistics, frechet_distance, inception_score, kernel_distance, precision_recall
from lamamba.metrics.inception import load_inception
from lamamba.metrics.scores import softmax
from tests.metrics.peers import peer, random_inception


def row(what: str, who: str, ours: float, theirs: float) -> None:
    difference = abs(ours - theirs)
    print(f"| {what} | {who} | {ours:.8g} | {theirs:.8g} | {difference:.1e} |", flush=True)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    statistics = Statistics(features.shape[1]).add(features)
    return statistics.mean, statistics.covariance()


def frechet(patch: pytest.MonkeyPatch) -> None:
    fidelity = peer("torch_fidelity", "metric_fid", patch, "torch_fidelity.utils")
    pytorch_fid = peer("pytorch_fid", "fid_score", patch, "torchvision", "torchvision.transforms",
                       "pytorch_fid.inception")
    for count, size in ((5000, 512), (300, 512), (5000, 64)):
        one, two = (make_features(count, size, seed) for seed in (0, 1))
        mine = frechet_distance(*moments(one), *moments(two))
        wide = [side.astype(np.float64) for side in (one, two)]
        known = [fidelity.fid_features_to_statistics(torch.from_numpy(side)) for side in wide]
        name = f"Fréchet distance, {count} images, {size} features"
        theirs = fidelity.fid_statistics_to_metric(*known, False)
        row(name, "torch-fidelity", mine, theirs["frechet_inception_distance"])
        row(name, "pytorch-fid (SciPy's sqrtm)", mine, pytorch_fid.calculate_frechet_distance(
            *(value for statistics in known for value in (statistics["mu"], statistics["sigma"]))))
    same = moments(make_features(300, 512, 0))
    row("the same 300 images twice, 512 features", "exact", frechet_distance(*same, *same), 0.0)


def others(patch: pytest.MonkeyPatch) -> None:
    one, two = (make_features(3000, 256, seed).astype(np.float64) for seed in (0, 1))
    tensors = torch.from_numpy(two), torch.from_numpy(one)
    prc = peer("torch_fidelity", "metric_prc", patch, "torch_fidelity.utils")
    options = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    theirs = prc.prc_features_to_metric(*tensors, **options)
    for name, value in zip(("precision", "recall"), precision_recall(one, two, 3), strict=True):
        row(f"{name}, 3000 images, 256 features", "torch-fidelity", value, theirs[name])
    kid = peer("torch_fidelity", "metric_kid", patch, "torch_fidelity.utils")
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None,
              "kid_kernel_poly_coef0": 1}
    row("kernel distance, one subset of 3000", "torch-fidelity", kernel_distance(one, two, 3000, 1)[0],
        float(kid.kernel_mmd(one, two, **kernel)))
    isc = peer("torch_fidelity", "metric_isc", patch, "torch_fidelity.utils")
    logits = np.random.default_rng(0).normal(size=(5000, 1008)) * 3
    theirs = isc.isc_features_to_metric(torch.from_numpy(logits), splits=5, shuffle=False)
    row("Inception Score, 5 splits of 1000", "torch-fidelity", inception_score(softmax(logits), 1000)[0],
        theirs["inception_score_mean"])


def network(patch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(random_inception(), f"{folder}/weights.pth")
        module = peer("torch_fidelity", "feature_extractor_inceptionv3", patch)
        theirs = module.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], f"{folder}/weights.pth")(images)
        ours = load_inception(f"{folder}/weights.pth")[0](images)
    for name, value, other in zip(("features", "logits"), (ours["features"], ours["logits"]), theirs, strict=True):
        error = float((value - other).abs().max() / other.abs().max())
        print(f"| Inception's {name}, random weights, 4 images | torch-fidelity | | | {error:.1e} of the largest |")


def main() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)              # pytorch-fid calls SciPy's old sqrtm
    print("| | beside | ours | theirs | difference |\n|---|---|---|---|---|")
    with pytest.MonkeyPatch.context() as patch:
        for part in (frechet, others, network):
            part(patch)


if __name__ == "__main__":
    main()
