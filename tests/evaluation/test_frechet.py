"""Frechet distances of known Gaussians."""

from __future__ import annotations

import numpy as np
import pytest

from dheads.errors import DheadsError
from dheads.evaluation.frechet import Gaussian, frechet_distance, too_few


def gaussian(features: np.ndarray) -> Gaussian:
    found = Gaussian()
    found.add(features)
    return found


def of_moments(mean: list[float], cov: np.ndarray) -> Gaussian:
    """The Gaussian of 2 D samples with exactly this mean and unbiased covariance."""
    steps = np.linalg.cholesky(cov).T * np.sqrt((2 * len(mean) - 1) / 2)
    return gaussian(np.array(mean) + np.concatenate([steps, -steps]))


def test_mean_and_covariance() -> None:
    found = of_moments([1, -2], np.array([[2, 0.5], [0.5, 1]]))
    np.testing.assert_allclose(found.mean, [1, -2])
    np.testing.assert_allclose(found.cov, [[2, 0.5], [0.5, 1]])
    assert (found.count, found.cov.dtype) == (4, np.float64)


def test_covariances_that_commute_have_a_closed_form() -> None:
    """tr (A + B - 2 (AB)^1/2) = sum (sqrt a - sqrt b)^2 for diagonal ones."""
    a, b = of_moments([0, 0, 0], np.diag([1.0, 4.0, 9.0])), of_moments([1, 2, -2], np.diag([4.0, 1.0, 0.25]))
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 1 + 2.5**2, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(9 + 1 + 1 + 2.5**2, rel=1e-12)


def test_covariances_that_do_not_commute_have_a_closed_form_in_two_dimensions() -> None:
    """tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det A det B))."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 0.5]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    distance = frechet_distance(of_moments([0, 0], a), of_moments([3, 4], b))
    assert distance == pytest.approx(25 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("count", [20, 300])
def test_the_same_samples_are_at_no_distance_and_shifted_ones_at_its_square(count: int) -> None:
    """Also for fewer samples (20) than features (100), where covariances are singular."""
    samples = np.random.default_rng(0).normal(5, 3, (count, 100)).astype(np.float32)
    here, shift = gaussian(samples), np.linspace(-1, 1, 100)
    assert frechet_distance(here, gaussian(samples[::-1])) < 1e-6 * np.trace(here.cov)
    assert frechet_distance(here, gaussian(samples + shift)) == pytest.approx(shift @ shift, rel=1e-6)


def test_constant_samples_are_as_far_apart_as_their_means() -> None:
    assert frechet_distance(gaussian(np.zeros((3, 4))), gaussian(np.ones((2, 4)))) == 4


def test_parts_in_any_order_and_merged_are_the_whole() -> None:
    samples = np.random.default_rng(1).normal(1e4, 1, (50, 6))
    parts = np.split(samples, [1, 1, 20, 33])  # one is empty
    forwards, backwards, merged = Gaussian(), Gaussian(), Gaussian()
    for part in parts:
        forwards.add(part)
        merged.merge(gaussian(part))
    for part in parts[::-1]:
        backwards.add(part)
    for found in (forwards, backwards, merged):
        assert found.count == 50
        np.testing.assert_allclose(found.mean, samples.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.cov, np.cov(samples.T), rtol=1e-8)


def test_one_sample_has_no_distance() -> None:
    pair = gaussian(np.eye(2))
    for other in (Gaussian(), gaussian(np.eye(2)[:1])):
        with pytest.raises(DheadsError, match=f"two samples or more a side, but there are {other.count} and 2"):
            frechet_distance(other, pair)
        assert np.isnan(other.cov).all()


def test_too_few_samples_give_a_warning() -> None:
    assert "2048 samples cannot span 2048 features" in str(too_few(2048, 2048))
    assert "2049 samples are fewer than the customary 10000" in str(too_few(2049, 2048))
    assert "401 samples are fewer than the customary 2048" in str(too_few(401, 400))
    assert too_few(10_000, 2048) is None
    assert too_few(2048, 400) is None
