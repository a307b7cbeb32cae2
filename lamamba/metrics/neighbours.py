"""Precision and recall, density and coverage: who lies within reach of whose nearest neighbours.

Never is the whole matrix of distances in memory. Squared distances come from float32 matrix products, block by block;
each has an error bound, and whatever the bound leaves open is decided in float64 from the original features. The counts
are those of a brute force in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lamamba.metrics.statistics import check_features

BLOCK = 4096
"""Images of each side in a block: 64 MiB of distances."""
SPARE = 4
"""More neighbours are kept than asked for, so that rounding cannot push the right one out."""
MANY = 50
"""Above one open comparison in so many, a block is computed again in float64 instead of pair by pair."""

Tell = Callable[[float], None]


class _Cloud:
    """Feature vectors about a common centre, scaled, in float32; the original ones beside them."""

    def __init__(self, features: np.ndarray, centre: np.ndarray, scale: float):
        self.exact, self.centre, self.scale = features, centre, scale
        self.rows: np.ndarray = np.empty(features.shape, dtype=np.float32)
        for part in _blocks(len(features)):
            self.rows[part] = (features[part] - centre) * scale
        squares = np.einsum("nd,nd->n", self.rows, self.rows, dtype=np.float64)
        self.squares = squares.astype(np.float32)
        # Rounding of a float32 product of this length, generously: a share of the squares of both vectors.
        share = 4 * float(np.finfo(np.float32).eps) * np.sqrt(features.shape[1])
        self.doubt = (share * squares).astype(np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def fingerprints(self) -> np.ndarray:
        """One number for each vector; equal vectors have equal ones."""
        return np.array([hash((row.astype(np.float64) + 0.0).tobytes()) for row in self.exact])

    def wide(self, rows: slice | np.ndarray) -> np.ndarray:
        """The scaled rows in float64."""
        return (self.exact[rows] - self.centre) * self.scale


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _clouds(reference: np.ndarray, samples: np.ndarray) -> tuple[_Cloud, _Cloud]:
    """Both sets about one centre, so that float32 spends its digits on differences."""
    centre = np.asarray(np.mean(reference, axis=0, dtype=np.float64))
    spans = [np.abs(side[part] - centre).max() for side in (reference, samples) for part in _blocks(len(side))]
    scale = 1 / float(max(spans)) if max(spans) > 0 else 1.0
    return _Cloud(reference, centre, scale), _Cloud(samples, centre, scale)


def _distances(a: _Cloud, rows: slice, b: _Cloud, columns: slice) -> np.ndarray:
    """Squared distances of a block, float32, scaled."""
    block = a.rows[rows] @ b.rows[columns].T
    block *= -2
    block += a.squares[rows, None]
    block += b.squares[None, columns]
    return block


def _wide_distances(a: _Cloud, rows: slice | np.ndarray, b: _Cloud, columns: slice) -> np.ndarray:
    """The same by products in float64; 0 between equal vectors."""
    left, right = a.wide(rows), b.wide(columns)
    block = -2 * (left @ right.T)
    block += np.einsum("nd,nd->n", left, left)[:, None]
    block += np.einsum("nd,nd->n", right, right)[None]
    block[a.fingerprints[rows, None] == b.fingerprints[None, columns]] = 0
    return np.maximum(block, 0, out=block)


def _exact(a: _Cloud, rows: np.ndarray, b: _Cloud, columns: np.ndarray) -> np.ndarray:
    """Squared distances of pairs (p,) from differences in float64, scaled."""
    distances = np.empty(len(rows))
    for start in range(0, len(rows), 2048):
        part = slice(start, start + 2048)
        difference = (a.exact[rows[part]].astype(np.float64) - b.exact[columns[part]]) * a.scale
        distances[part] = np.einsum("pd,pd->p", difference, difference)
    return distances


class _Nearest:
    """The nearest so far of every vector, and who they are."""

    def __init__(self, count: int, kept: int):
        self.kept = kept
        self.values = np.full((count, kept), np.inf, dtype=np.float32)
        self.names = np.zeros((count, kept), dtype=np.int64)

    def take(self, block: np.ndarray, first_row: int, first_column: int) -> None:
        """Let a block's distances compete: all of them at first, later the few that beat somebody."""
        mine = slice(first_row, first_row + len(block))
        if np.isinf(self.values[mine]).any():
            if block.shape[1] > self.kept:
                places = np.argpartition(block, self.kept - 1, axis=1)[:, : self.kept]
            else:
                places = np.tile(np.arange(block.shape[1]), (len(block), 1))
            self._join(np.arange(*mine.indices(len(self.values))), np.take_along_axis(block, places, axis=1),
                       places + first_column)
            return
        rows, places = np.nonzero(block < self.values[mine].max(axis=1)[:, None])
        who, starts, counts = np.unique(rows, return_index=True, return_counts=True)
        if not len(who):
            return
        turn = np.arange(len(rows)) - np.repeat(starts, counts)                 # 0, 1, .. within each row
        line = np.repeat(np.arange(len(who)), counts)
        values = np.full((len(who), counts.max()), np.inf, dtype=np.float32)
        names = np.zeros(values.shape, dtype=np.int64)
        values[line, turn], names[line, turn] = block[rows, places], places + first_column
        self._join(who + first_row, values, names)

    def _join(self, rows: np.ndarray, values: np.ndarray, names: np.ndarray) -> None:
        values = np.concatenate([self.values[rows], values], axis=1)
        names = np.concatenate([self.names[rows], names], axis=1)
        best = np.argpartition(values, self.kept - 1, axis=1)[:, : self.kept]
        self.values[rows] = np.take_along_axis(values, best, axis=1)
        self.names[rows] = np.take_along_axis(names, best, axis=1)


def _reach(cloud: _Cloud, k: int, tell: Tell) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest other one, (n,) float64, scaled.

    A block serves its rows and its columns: distances are symmetric.
    """
    count = len(cloud)
    nearest = _Nearest(count, min(k + SPARE, count - 1))
    blocks = _blocks(count)
    for i, rows in enumerate(blocks):
        for columns in blocks[i:]:
            block = _distances(cloud, rows, cloud, columns)
            if rows == columns:
                np.fill_diagonal(block, np.inf)
                nearest.take(block, rows.start, rows.start)
            else:
                nearest.take(block, rows.start, columns.start)
                nearest.take(np.ascontiguousarray(block.T), columns.start, rows.start)
            tell(block.size * cloud.rows.shape[1])
    everyone = np.repeat(np.arange(count), nearest.kept)
    pairs = _exact(cloud, everyone, cloud, nearest.names.ravel()).reshape(count, nearest.kept)
    reach = np.sort(pairs, axis=1)[:, k - 1]
    # Nobody who was left out can be nearer than the farthest who was kept, less the doubt of both.
    certain = reach <= nearest.values.max(axis=1) - 2 * (cloud.doubt + cloud.doubt.max())
    if nearest.kept == count - 1:
        certain[:] = True
    open_rows = np.flatnonzero(~certain & (reach > 0))
    for part in (open_rows[start : start + 512] for start in range(0, len(open_rows), 512)):
        wide = np.concatenate([_wide_distances(cloud, part, cloud, columns) for columns in blocks], axis=1)
        wide[np.arange(len(part)), part] = np.inf
        names = np.argpartition(wide, nearest.kept - 1, axis=1)[:, : nearest.kept]
        pairs = _exact(cloud, np.repeat(part, nearest.kept), cloud, names.ravel()).reshape(len(part), -1)
        reach[part] = np.sort(pairs, axis=1)[:, k - 1]
    return reach


def _within(
    block: np.ndarray, a: _Cloud, rows: slice, b: _Cloud, columns: slice, reach: np.ndarray, *, every: bool
) -> np.ndarray:
    """Which vectors of a lie within the reach of which of b, (rows, columns) bool.

    Args:
        block: their squared distances in float32.
        reach: of b's vectors, (columns,).
        every: decide every pair; otherwise only those of rows that surely lie within nobody's reach.
    """
    doubt = b.doubt[columns] + np.float32(1e-6) * reach.astype(np.float32)
    near = block - a.doubt[rows, None]
    maybe = near <= (reach.astype(np.float32) + doubt)[None]
    near += 2 * a.doubt[rows, None]
    surely = near <= (reach.astype(np.float32) - doubt)[None]
    maybe &= ~surely
    if not every:
        maybe[surely.any(axis=1)] = False
    who, whose = np.nonzero(maybe)
    if len(who) > block.size // MANY:
        return _wide_distances(a, rows, b, columns) <= reach[None]
    surely[who, whose] = _exact(a, who + rows.start, b, whose + columns.start) <= reach[whose]
    return surely


@dataclass(frozen=True)
class _Sides:
    reference: np.ndarray
    samples: np.ndarray

    @classmethod
    def checked(cls, reference: np.ndarray, samples: np.ndarray, k: int) -> _Sides:
        reference, samples = check_features(reference, "reference features"), check_features(samples)
        if reference.shape[1] != samples.shape[1]:
            raise ValueError(
                f"{reference.shape[1]} reference features against {samples.shape[1]}: they come from different networks"
            )
        fewest = min(len(reference), len(samples))
        if not 1 <= k < fewest:
            fits = f"choose 1 .. {fewest - 1}" if fewest > 1 else "neighbours need at least 2 of each"
            raise ValueError(f"k={k} does not fit {len(reference)} reference images and {len(samples)} samples; {fits}")
        return cls(reference, samples)


class _Work:
    """How much of the multiply-adds is done, from 0 to 1."""

    def __init__(self, total: float, on_progress: Tell | None):
        self._total, self._done, self._on_progress = total, 0.0, on_progress

    def __call__(self, more: float) -> None:
        self._done += more
        if self._on_progress:
            self._on_progress(min(1.0, self._done / self._total))


def _within_itself(count: int) -> float:
    """Pairs whose distances are computed for the reach of so many vectors."""
    blocks = _blocks(count)
    sizes = [part.stop - part.start for part in blocks]
    return float(sum(size * sum(sizes[i:]) for i, size in enumerate(sizes)))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, on_progress: Tell | None = None
) -> tuple[float, float]:
    """Share of samples within reach of a reference image, and of reference images within reach of a sample.

    An image reaches as far as its k-th nearest neighbour on its own side (Kynkäänniemi et al., 2019, Eq. 1-3; distances
    equal to the reach count, as in ADM's evaluator).

    Args:
        reference, samples: features, (n, d) and (m, d), float32 or float64.
        k: neighbours, the image itself not counted.
        on_progress: told the share done, 0 .. 1.

    Returns:
        (precision, recall)

    Raises:
        ValueError: when features do not fit each other, are not finite, or are too few for k.
    """
    sides = _Sides.checked(reference, samples, k)
    real, fake = _clouds(sides.reference, sides.samples)
    pairs = _within_itself(len(real)) + _within_itself(len(fake)) + len(real) * len(fake)
    work = _Work(pairs * reference.shape[1], on_progress)
    real_reach, fake_reach = _reach(real, k, work), _reach(fake, k, work)
    precise, recalled = np.zeros(len(fake), dtype=bool), np.zeros(len(real), dtype=bool)
    for rows in _blocks(len(fake)):
        for columns in _blocks(len(real)):
            block = _distances(fake, rows, real, columns)
            precise[rows] |= _within(block, fake, rows, real, columns, real_reach[columns], every=False).any(axis=1)
            turned = np.ascontiguousarray(block.T)
            recalled[columns] |= _within(turned, real, columns, fake, rows, fake_reach[rows], every=False).any(axis=1)
            work(block.size * reference.shape[1])
    return float(precise.mean()), float(recalled.mean())


def density_coverage(
    reference: np.ndarray, samples: np.ndarray, k: int = 5, on_progress: Tell | None = None
) -> tuple[float, float]:
    """How many reference images reach a sample, over k; and the share of reference images that reach one.

    One outlier among the reference images does not inflate these as it does precision, nor one among the samples recall
    (Naeem et al., 2020, Eq. 3-4).

    Args: as `precision_recall`.

    Returns:
        (density, coverage); density may exceed 1.
    """
    sides = _Sides.checked(reference, samples, k)
    real, fake = _clouds(sides.reference, sides.samples)
    work = _Work((_within_itself(len(real)) + len(real) * len(fake)) * reference.shape[1], on_progress)
    reach = _reach(real, k, work)
    hits, covered = 0, np.zeros(len(real), dtype=bool)
    for rows in _blocks(len(fake)):
        for columns in _blocks(len(real)):
            block = _distances(fake, rows, real, columns)
            within = _within(block, fake, rows, real, columns, reach[columns], every=True)
            hits += int(within.sum())
            covered[columns] |= within.any(axis=0)
            work(block.size * reference.shape[1])
    return hits / (k * len(fake)), float(covered.mean())
