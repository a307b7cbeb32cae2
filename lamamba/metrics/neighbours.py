"""Precision and recall, density and coverage: manifolds estimated by the k nearest neighbours of features.

Squared distances |a|^2 + |b|^2 - 2 <a, b> come from float64 matrix products, block by block: the whole matrix is never
in memory. Distances that differ by no more than the rounding of such a product count as equal, so that repeated images
are 0 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lamamba.metrics.statistics import check_pair

BLOCK = 2048
"""Images of each set in a block: 32 MiB of distances."""

ReportShare = Callable[[float], None]


def _blocks(features: np.ndarray) -> list[slice]:
    return [slice(start, min(start + BLOCK, len(features))) for start in range(0, len(features), BLOCK)]


class _Distances:
    """Squared distances of features about a centre, block by block; reports the share of them that is computed."""

    def __init__(self, centre: np.ndarray, total: int, report: ReportShare | None):
        self._centre, self._total, self._done, self._report = centre, total, 0, report

    def __call__(self, a: np.ndarray, b: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
        """Of rows (n, d) and (m, d): (n, m), lowered by a share of both vectors' squares."""
        a, b = (c := a - self._centre), c if b is a else b - self._centre       # in float64, of a block at a time
        distances = a @ b.T
        distances *= -2
        distances += (1 - tolerance) * np.einsum("nd,nd->n", a, a)[:, None]
        distances += (1 - tolerance) * np.einsum("nd,nd->n", b, b)[None]
        self._done += distances.size
        if self._report:
            self._report(min(1.0, self._done / self._total))
        return np.maximum(distances, 0, out=distances)


def _radii(features: np.ndarray, k: int, measure: _Distances) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest other one, (n,)."""
    nearest, blocks = np.full((len(features), k), np.inf), _blocks(features)

    def update(rows: slice, distances: np.ndarray) -> None:
        candidates = np.concatenate([nearest[rows], distances], axis=1)
        nearest[rows] = np.partition(candidates, k - 1, axis=1)[:, :k]

    for i, rows in enumerate(blocks):
        block = features[rows]
        for columns in blocks[i:]:                                              # symmetric: a block serves both sides
            distances = measure(block, block if rows == columns else features[columns])
            if rows == columns:
                np.fill_diagonal(distances, np.inf)
            else:
                update(columns, distances.T)
            update(rows, distances)
    return nearest.max(axis=1)


def _between(
    reference: np.ndarray, samples: np.ndarray, measure: _Distances
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Blocks of squared distances (samples, reference), less what rounding may have added."""
    tolerance = 4 * float(np.finfo(np.float64).eps) * samples.shape[1] ** 0.5   # rounding of a product of d terms
    for rows in _blocks(samples):
        for columns in _blocks(reference):
            yield rows, columns, measure(samples[rows], reference[columns], tolerance)


def _check(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    reference, samples = check_pair(reference, samples)
    fewest = min(len(reference), len(samples))
    if not 1 <= k < fewest:
        fits = f"choose 1 .. {fewest - 1}" if fewest > 1 else "neighbours need at least 2 of each"
        raise ValueError(f"k={k} does not fit {len(reference)} reference images and {len(samples)} samples; {fits}")
    return reference, samples


def _measure(reference: np.ndarray, others: list[np.ndarray], pairs: int, report: ReportShare | None) -> _Distances:
    """Distances about the centre of the reference, which keeps the squares small.

    Args:
        others: sets whose `_radii` are computed.
        pairs: other distances that are computed.
    """
    for features in others:
        sizes = [block.stop - block.start for block in _blocks(features)]
        pairs += sum(size * sum(sizes[i:]) for i, size in enumerate(sizes))
    return _Distances(reference.mean(axis=0, dtype=np.float64), pairs, report)


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, on_progress: ReportShare | None = None
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, Eq. 1-3).

    Precision is the share of samples within the manifold of the reference images, recall the share of reference images
    within the samples' manifold. A manifold is the union of balls around a set's images, each as large as the distance
    to the k-th nearest other image of the set; a distance equal to the radius lies within, as in ADM's evaluator.

    Args:
        reference, samples: features, (n, d) and (m, d), float32 or float64.
        k: neighbours, the image itself not counted.
        on_progress: called with the share done, 0 .. 1.

    Returns:
        (precision, recall)

    Raises:
        ValueError: when features do not fit each other, are not finite, or are too few for k.
    """
    real, fake = _check(reference, samples, k)
    measure = _measure(real, [real, fake], len(real) * len(fake), on_progress)
    real_radii, fake_radii = _radii(real, k, measure), _radii(fake, k, measure)
    precise, recalled = np.zeros(len(fake), dtype=bool), np.zeros(len(real), dtype=bool)
    for rows, columns, distances in _between(real, fake, measure):
        precise[rows] |= (distances <= real_radii[None, columns]).any(axis=1)
        recalled[columns] |= (distances <= fake_radii[rows, None]).any(axis=0)
    return float(precise.mean()), float(recalled.mean())


def density_coverage(
    reference: np.ndarray, samples: np.ndarray, k: int = 5, on_progress: ReportShare | None = None
) -> tuple[float, float]:
    """Density and coverage (Naeem et al., 2020, Eq. 3-4).

    Density is the mean number of reference balls that a sample lies in, over k; coverage the share of reference balls
    that hold a sample. An outlier among the reference images does not inflate them as it does precision, nor one among
    the samples recall.

    Args: as `precision_recall`.

    Returns:
        (density, coverage); density may exceed 1.
    """
    real, fake = _check(reference, samples, k)
    measure = _measure(real, [real], len(real) * len(fake), on_progress)
    radii = _radii(real, k, measure)
    hits, covered = 0, np.zeros(len(real), dtype=bool)
    for _, columns, distances in _between(real, fake, measure):
        within = distances <= radii[None, columns]
        hits += int(within.sum())
        covered[columns] |= within.any(axis=0)
    return hits / (k * len(fake)), float(covered.mean())
