"""The Frechet distance of two sets of features, which is what FID and FVD are (Heusel et al., 2017, eq. 6).

It falls with the number of samples, so compare only distances that are computed from equally many.
"""

from __future__ import annotations

import numpy as np

from dheads.errors import DheadsError
from dheads.evaluation.features import I3D_DIM, INCEPTION_DIM

# Numbers of samples that Heusel et al. (FID) and StyleGAN-V (FVD) use at least.
_CUSTOMARY = {INCEPTION_DIM: 10_000, I3D_DIM: 2_048}


class Gaussian:
    """Mean and covariance in float64 of features that arrive in batches; its memory is independent of their number."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(1)  # (D,)
        self._scatter = np.zeros((1, 1))  # (D, D), sum of (x - mean) (x - mean)^T

    @property
    def cov(self) -> np.ndarray:
        """The unbiased covariance (D, D); NaN for fewer than two samples."""
        return self._scatter / (self.count - 1 if self.count > 1 else np.nan)

    def add(self, features: np.ndarray) -> None:
        """Add features (N, D)."""
        batch = Gaussian()
        batch.count = len(features)
        if batch.count:
            batch.mean = features.mean(axis=0, dtype=np.float64)
            centred = features - batch.mean
            batch._scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: Gaussian) -> None:
        """Add all samples of another one."""
        count = self.count + other.count
        if not other.count:
            return
        # S = S_a + S_b + n_a n_b / n (m_b - m_a) (m_b - m_a)^T
        delta = other.mean - self.mean
        self._scatter = self._scatter + other._scatter + np.outer(delta, delta) * (self.count * other.count / count)
        self.mean = self.mean + delta * (other.count / count)
        self.count = count


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance of two Gaussians. Raises DheadsError if one of them has fewer than two samples."""
    if min(a.count, b.count) < 2:
        raise DheadsError(
            f"a Frechet distance needs two samples or more a side, but there are {a.count} and {b.count}; "
            "give more or longer videos"
        )
    # d^2 = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2
    # With C = R R^T the last trace is the sum of the singular values of R_a^T R_b, which is always real.
    shared = np.linalg.svd(_root(a.cov).T @ _root(b.cov), compute_uv=False).sum()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * shared))


def _root(cov: np.ndarray) -> np.ndarray:
    """R (D, rank) with R R^T = cov (D, D)."""
    values, vectors = np.linalg.eigh(cov)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root: np.ndarray = vectors[:, kept] * np.sqrt(values[kept])
    return root


def too_few(count: int, dim: int) -> str | None:
    """A warning about a distance from `count` samples of `dim` features; None if they are enough."""
    if count <= dim:
        return f"{count} samples cannot span {dim} features, so the distance is far too large and hardly comparable"
    if count < _CUSTOMARY.get(dim, 0):
        return f"{count} samples are fewer than the customary {_CUSTOMARY[dim]}, so the distance is somewhat too large"
    return None
