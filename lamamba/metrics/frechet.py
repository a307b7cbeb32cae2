"""Fréchet distance between two Gaussians: FID, sFID and FD-DINOv2, each on the features of another network."""

from __future__ import annotations

import numpy as np


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of N(mu1, sigma1) and N(mu2, sigma2).

        |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)         (Heusel et al., 2017, Eq. 6)

    The last trace is the sum of the singular values of sigma1^(1/2) sigma2^(1/2), both roots from symmetric
    eigendecompositions: nothing becomes complex, nothing is added to a diagonal, and no digits are lost to the root of
    a rounding error. Eigenvalues below rounding (size x 2.2e-16 x the largest) count as zero: with fewer images than
    features, most are.

    Args:
        mu1, mu2: means, (d,).
        sigma1, sigma2: covariances, (d, d), symmetric.

    Raises:
        ValueError: when shapes do not fit, numbers are not finite, or a matrix is not a covariance.
    """
    mu1, sigma1 = _checked(mu1, sigma1, "first")
    mu2, sigma2 = _checked(mu2, sigma2, "second")
    if len(mu1) != len(mu2):
        raise ValueError(f"{len(mu1)} features against {len(mu2)}: they come from different feature networks")
    mixed = np.linalg.svd(_root(sigma1, "first").T @ _root(sigma2, "second"), compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * mixed)


def _checked(mu: np.ndarray, sigma: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"the {which} mean has shape {mu.shape} and its covariance {sigma.shape}; (d,) and (d, d) fit")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"the {which} mean or covariance holds NaN or infinite values")
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8 * np.abs(sigma).max()):
        raise ValueError(f"the {which} covariance is not symmetric")
    return mu, sigma


def _root(sigma: np.ndarray, which: str) -> np.ndarray:
    """R (d, rank) with R R^T = sigma."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    largest = np.abs(values).max()
    if values[0] < -1e-3 * largest:
        raise ValueError(
            f"the {which} covariance has the eigenvalue {values[0]:.3g} (largest {largest:.3g}); none may be negative"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, kept] * np.sqrt(values[kept])
