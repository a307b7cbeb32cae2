"""torch-fidelity's and pytorch-fid's own functions give the same figures on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamamba.evaluation import Statistics, frechet_distance, inception_score, kernel_distance, precision_recall
from lamamba.metrics.scores import softmax
from tests.metrics.peers import peer

STUBS = ("torch_fidelity.utils",)


@pytest.fixture(scope="module")
def features():
    """Alike to pool3: not negative, correlated, (1500, 96) each."""
    draws = np.random.default_rng(0)
    mix = draws.normal(size=(24, 96))
    sides = (draws.normal(size=(1500, 24)) @ mix * 0.2 + draws.normal(size=(1500, 96)) * 0.3 for _ in range(2))
    return [np.maximum(side + shift, 0).astype(np.float32) for shift, side in zip((0.2, 0.25), sides, strict=True)]


def ours(features):
    one, two = (Statistics(96).add(side) for side in features)
    return frechet_distance(one.mean, one.covariance(), two.mean, two.covariance())


@pytest.mark.parametrize("images", [1500, 60])
def test_frechet_of_torch_fidelity(features, images, monkeypatch):
    theirs = peer("torch_fidelity", "metric_fid", monkeypatch, *STUBS)
    cut = [side[:images] for side in features]
    statistics = [theirs.fid_features_to_statistics(torch.from_numpy(side.astype(np.float64))) for side in cut]
    value = theirs.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours(cut) == pytest.approx(value, rel=1e-9 if images == 1500 else 1e-5)


@pytest.mark.parametrize("images", [1500, 60])
def test_frechet_of_pytorch_fid(features, images, monkeypatch):
    absent = ("torchvision", "torchvision.transforms", "pytorch_fid.inception")
    theirs = peer("pytorch_fid", "fid_score", monkeypatch, *absent)
    cut = [side[:images].astype(np.float64) for side in features]
    try:
        value = theirs.calculate_frechet_distance(*(f(side) for side in cut for f in (lambda x: x.mean(0), cov)))
    except (TypeError, ValueError) as error:                                    # SciPy's sqrtm has lost its disp
        pytest.skip(f"pytorch-fid does not run with this SciPy: {error}")
    assert ours(cut) == pytest.approx(value, rel=1e-9 if images == 1500 else 1e-3)


def cov(x):
    return np.cov(x, rowvar=False)


def test_kernel_distance_of_torch_fidelity(features, monkeypatch):
    theirs = peer("torch_fidelity", "metric_kid", monkeypatch, *STUBS)
    x, y = (side.astype(np.float64) for side in features)
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None,
              "kid_kernel_poly_coef0": 1}
    assert kernel_distance(x, y, 1500, 1)[0] == pytest.approx(theirs.kernel_mmd(x, y, **kernel), rel=1e-9)
    values = theirs.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=100, kid_subset_size=200, verbose=False, rng_seed=0,
        **kernel,
    )
    mean, spread = kernel_distance(x, y, 200, 100)                              # other subsets
    assert mean == pytest.approx(values["kernel_inception_distance_mean"], abs=4 * spread / 10)
    assert spread == pytest.approx(values["kernel_inception_distance_std"], rel=0.4)


def test_inception_score_of_torch_fidelity(monkeypatch):
    theirs = peer("torch_fidelity", "metric_isc", monkeypatch, *STUBS)
    logits = np.random.default_rng(0).normal(size=(1000, 30)) * 3
    values = theirs.isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
    expected = (values["inception_score_mean"], values["inception_score_std"])
    assert inception_score(softmax(logits), 250) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_of_torch_fidelity(features, monkeypatch):
    theirs = peer("torch_fidelity", "metric_prc", monkeypatch, *STUBS)
    reference, samples = features
    options = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    doubles = [torch.from_numpy(side.astype(np.float64)) for side in (samples, reference)]
    values = theirs.prc_features_to_metric(*doubles, **options)
    assert precision_recall(reference, samples, 3) == pytest.approx((values["precision"], values["recall"]), abs=1e-7)
