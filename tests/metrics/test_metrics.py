"""The figures agree with closed forms, SciPy and brute force, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from lamamba.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbours,
    precision_recall,
)

linalg = pytest.importorskip("scipy.linalg", reason="needs scipy")


def covariance(draws: np.random.Generator, size: int, condition: float = 1e2) -> np.ndarray:
    basis = np.linalg.qr(draws.normal(size=(size, size)))[0]
    return basis * np.logspace(0, -np.log10(condition), size) @ basis.T


def by_scipy(mu1, sigma1, mu2, sigma2) -> float:
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * linalg.sqrtm(sigma1 @ sigma2).real)


# Fréchet distance

def test_frechet_of_gaussians_on_a_line_and_on_common_axes():
    assert frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])) == pytest.approx(5)
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + 14
    assert frechet_distance(np.zeros(3), np.diag(a), np.array([1.0, 2, 3]), np.diag(b)) == pytest.approx(expected)


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e10])
def test_frechet_agrees_with_scipy(condition):
    draws = np.random.default_rng(0)
    values = (draws.normal(size=60), covariance(draws, 60, condition), draws.normal(size=60), covariance(draws, 60))
    assert frechet_distance(*values) == pytest.approx(by_scipy(*values), rel=1e-6)


def test_frechet_with_fewer_images_than_features_agrees_with_extended_precision():
    mpmath = pytest.importorskip("mpmath", reason="needs mpmath")
    draws = np.random.default_rng(1)
    x, y = draws.normal(size=(6, 12)), draws.normal(size=(7, 12)) * 2
    values = (x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    with mpmath.workdps(60):
        product = mpmath.matrix(values[1]) * mpmath.matrix(values[3])
        roots = sum(mpmath.sqrt(abs(value.real)) for value in mpmath.eig(product, left=False, right=False))
        # cov in float64 has eigenvalues of its own rounding, 1e-16: their roots are all the difference there may be
        expected = float(((values[0] - values[2]) ** 2).sum() + np.trace(values[1] + values[3]) - 2 * roots)
    assert frechet_distance(*values) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("images", "others"), [(40, 50), (40, 900), (250, 300)])
def test_frechet_of_few_images_is_that_of_the_data_themselves(images, others):
    """tr (S1 S2)^(1/2) is the sum of singular values of X Y^T, centred: no covariance, and no roots of rounding."""
    draws = np.random.default_rng(3)
    mix = draws.normal(size=(300, 300)) * np.logspace(0, -4, 300)[:, None]
    x, y = draws.normal(size=(images, 300)) @ mix, draws.normal(size=(others, 300)) @ mix * 1.3 + 0.1
    centred = [(side - side.mean(0)) / np.sqrt(len(side) - 1) for side in (x, y)]
    mixed = linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + sum((side**2).sum() for side in centred) - 2 * mixed
    assert frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)) == pytest.approx(expected, rel=1e-7)


def test_frechet_of_collapsed_sets():
    """All images alike: a covariance of zeros."""
    mu, zeros, sigma = np.ones(4), np.zeros((4, 4)), np.diag([1.0, 2, 3, 4])
    assert frechet_distance(mu, zeros, mu, zeros) == 0
    assert frechet_distance(mu, zeros, 3 * mu, sigma) == pytest.approx(16 + 10)


@pytest.mark.parametrize("images", [20, 5000])
def test_identical_sets_are_0_apart(images):
    x = np.maximum(np.random.default_rng(2).normal(size=(images, 200)), 0) * 3
    s = Statistics(200).add(x)
    assert abs(frechet_distance(s.mean, s.covariance(), s.mean, s.covariance())) < 1e-6


@pytest.mark.parametrize(("change", "message"), [
    (lambda v: (v[0][:2], v[1][:2, :2], *v[2:]), "2 features against 3: they come from different feature networks"),
    (lambda v: (v[0], v[1][:2], *v[2:]), r"shape \(3,\) and its covariance \(2, 3\)"),
    (lambda v: (v[0] * np.nan, *v[1:]), "NaN"),
    (lambda v: (v[0], v[1] + np.tri(3), *v[2:]), "not symmetric"),
    (lambda v: (v[0], -v[1], *v[2:]), "eigenvalue -1"),
])
def test_frechet_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*change((np.zeros(3), np.eye(3), np.zeros(3), np.eye(3))))


# Statistics

def test_statistics_are_numpys_whatever_the_pieces():
    x = np.random.default_rng(0).normal(size=(300, 8)) * 1e-3 + 1e6              # far from zero: raw moments would fail
    pieces = Statistics(8).add(x[:1]).add(x[1:130]).add(x[130:])
    assert pieces.count == 300
    np.testing.assert_allclose(pieces.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(pieces.covariance(), np.cov(x.T), rtol=1e-6, atol=1e-12)


def test_statistics_of_processes_reduce_to_those_of_all_features():
    import threading

    x = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32) + 100
    parts, results = [x[:50], x[50:50], x[50:]], {}
    barrier, board = threading.Barrier(3), {}

    def work(rank):
        calls = 0

        def all_reduce(array):
            nonlocal calls
            calls += 1
            board[calls, rank] = array
            barrier.wait()
            return sum(board[calls, other] for other in range(3))

        mine = Statistics(5).add(parts[rank]) if len(parts[rank]) else Statistics(5)
        results[rank] = mine.reduce(all_reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        assert result.count == 90
        np.testing.assert_allclose(result.mean, x.astype(float).mean(0), rtol=1e-12)
        np.testing.assert_allclose(result.covariance(), np.cov(x.astype(float).T), rtol=1e-9)


def test_statistics_refuse():
    with pytest.raises(ValueError, match="1 image: a covariance needs at least 2"):
        Statistics(3).add(np.zeros((1, 3))).covariance()
    with pytest.raises(ValueError, match="of 2 of 4 images are NaN or infinite, first of image 1"):
        Statistics(1).add(np.array([[0.0], [np.nan], [1], [np.inf]]))
    with pytest.raises(ValueError, match="4 features came after 3"):
        Statistics(3).add(np.zeros((2, 4)))


# Precision, recall, density, coverage

def brute_force(reference, samples, k):
    """(precision, recall, density, coverage) from whole matrices of differences in float64."""
    def distances(x, y):
        return np.stack([((y.astype(np.float64) - row) ** 2).sum(1) for row in x.astype(np.float64)])

    reach, reach_back = (np.sort(distances(side, side), axis=1)[:, k] for side in (reference, samples))
    between = distances(reference, samples)
    within = between <= reach[:, None]
    return within.any(0).mean(), (between <= reach_back).any(1).mean(), within.sum() / (k * len(samples)), \
        within.any(1).mean()


def clouds():
    draws = np.random.default_rng(0)
    gauss = draws.normal(size=(500, 20))
    yield "gauss", gauss, draws.normal(size=(700, 20)) * 0.9 + 0.2
    yield "float32", gauss.astype(np.float32), draws.normal(size=(300, 20)).astype(np.float32)
    yield "identical", gauss, gauss.copy()
    yield "repeated", np.repeat(gauss[:60], 8, axis=0), np.repeat(gauss[40:100], 8, axis=0)
    yield "constant", np.ones((50, 4)), np.ones((40, 4))
    yield "far and tight", *(draws.integers(0, 3, (400, 1)) * 1e3 + draws.normal(size=(400, 8)) * 1e-1 for _ in "ab")
    yield "outlier", np.concatenate([gauss[:, :8], np.full((1, 8), 1e6)]), draws.normal(size=(400, 8))
    yield "few", gauss[:5], gauss[5:9]


@pytest.mark.parametrize(("reference", "samples"), [c[1:] for c in clouds()], ids=[c[0] for c in clouds()])
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_are_those_of_brute_force(reference, samples, k, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 128)
    expected = brute_force(reference, samples, k)
    shares: list[float] = []
    assert precision_recall(reference, samples, k, shares.append) == expected[:2]
    assert density_coverage(reference, samples, k) == pytest.approx(expected[2:], abs=1e-15)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_neighbours_need_less_memory_than_the_matrix_of_distances(monkeypatch):
    import tracemalloc

    monkeypatch.setattr(neighbours, "BLOCK", 256)
    reference, samples = np.random.default_rng(0).normal(size=(2, 4000, 8)).astype(np.float32)
    for function in (precision_recall, density_coverage):
        tracemalloc.start()
        function(reference, samples)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4000 * 4000 * 4 / 5                                       # a fifth of one matrix in float32


def test_neighbours_refuse():
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match="k=4 does not fit 4 reference images and 9 samples; choose 1 .. 3"):
        precision_recall(x, np.zeros((9, 2)), k=4)
    with pytest.raises(ValueError, match="neighbours need at least 2"):
        density_coverage(x, x[:1], k=1)
    with pytest.raises(ValueError, match="2 reference features against 3"):
        precision_recall(x, np.zeros((9, 3)))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(x, x + np.nan)


# Kernel distance and Inception Score

def test_kernel_distance_of_whole_sets_by_sums():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(12, 3)), draws.normal(size=(12, 3)) + 0.5
    kernel = lambda a, b: (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3                   # noqa: E731
    inside = [sum(kernel(s[i], s[j]) for i in range(12) for j in range(12) if i != j) / 132 for s in (x, y)]
    expected = sum(inside) - 2 * sum(kernel(a, b) for a in x for b in y) / 144
    mean, spread = kernel_distance(x, y, subset_size=12, num_subsets=3)
    assert mean == pytest.approx(expected)
    assert spread == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, y, 6, 5, seed=1) == kernel_distance(x, y, 6, 5, seed=1) != kernel_distance(x, y, 6, 5, 2)
    with pytest.raises(ValueError, match="a subset has 2 .. 12"):
        kernel_distance(x, y, subset_size=13)


def test_the_kernel_distance_of_one_distribution_is_0_on_average():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(2, 2000, 16))
    mean, spread = kernel_distance(x, y, 100, 100)
    assert abs(mean) < 3 * spread / np.sqrt(20)


def test_inception_score_of_known_cases():
    sure = np.tile(np.eye(4), (5, 1))
    assert inception_score(sure, 20) == pytest.approx((4, 0))                   # four classes, each as sure as can be
    assert inception_score(np.full((20, 4), 0.25), 7) == pytest.approx((1, 0))
    halves = np.concatenate([sure, np.full((20, 4), 0.25)])
    assert inception_score(halves, 20) == pytest.approx((2.5, 1.5))             # splits follow each other
    assert inception_score(halves, 40)[0] == pytest.approx(2)                   # exp of half of log 4
    with pytest.raises(ValueError, match="softmax"):
        inception_score(np.full((3, 4), 0.5))
