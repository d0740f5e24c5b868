"""Frechet distances of known Gaussians, and the two networks' loading and features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dheads.errors import DheadsError
from dheads.evaluation.frechet import (
    CLIP_FRAMES,
    Gaussian,
    Inception,
    InceptionFeatures,
    VideoFeatures,
    frechet_distance,
    load_i3d,
    load_inception,
    too_few,
)
from dheads.system.files import file_sha256
from dheads.weights import listing

# What pytorch-fid 0.3.0 makes of `known_state` and `pictures`: features 0, 500, 1000, 1500 and 2047 of each picture.
PYTORCH_FID = [[2.45714, 0.68105, 2.23807, 2.47276, 6.63895], [2.3547, 0.78362, 2.21196, 2.47099, 6.81707]]


def gaussian(features: np.ndarray) -> Gaussian:
    found = Gaussian()
    found.add(features)
    return found


def of_moments(mean: list[float], cov: np.ndarray) -> Gaussian:
    """2 D samples whose mean and unbiased covariance are exactly these."""
    steps = np.linalg.cholesky(cov).T * np.sqrt((2 * len(mean) - 1) / 2)
    return gaussian(np.array(mean) + np.concatenate([steps, -steps]))


# --- Distance


def test_moments_are_the_samples_own() -> None:
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
    """Also with fewer samples (20) than features (100), where covariances have no inverse."""
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


def test_too_few_samples_are_said() -> None:
    assert "2048 samples cannot span 2048 features" in str(too_few(2048, 2048))
    assert "2049 samples are fewer than the customary 10000" in str(too_few(2049, 2048))
    assert "401 samples are fewer than the customary 2048" in str(too_few(401, 400))
    assert too_few(10_000, 2048) is None
    assert too_few(2048, 400) is None


# --- Pictures


@pytest.fixture(scope="module")
def known_state() -> dict[str, Tensor]:
    """Weights for Inception that anyone can make again, scaled so that its features are neither nothing nor huge."""
    rng, state = np.random.default_rng(0), {}
    template = Inception().state_dict()
    for name in sorted(template):
        shape = tuple(template[name].shape)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("conv.weight"):
            value = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = name.endswith("bn.weight") + 0.1 * rng.standard_normal(shape)
        state[name] = torch.as_tensor(np.asarray(value, np.float32))
    return state


@pytest.fixture(scope="module")
def inception(known_state: dict[str, Tensor]) -> InceptionFeatures:
    network = Inception()
    network.load_state_dict(known_state)
    return InceptionFeatures(network, "cpu")


def pictures(count: int = 2, size: int = 128) -> np.ndarray:
    """Smooth coloured noise (count, size, size, 3) uint8."""
    coarse = torch.as_tensor(np.random.default_rng(1).integers(0, 256, (count, 3, 12, 12)), dtype=torch.float32)
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").round().byte().movedim(1, -1).numpy()


def test_inception_is_the_one_of_pytorch_fid(inception: InceptionFeatures) -> None:
    features = inception(pictures())
    assert (features.shape, features.dtype) == ((2, 2048), np.float32)
    np.testing.assert_allclose(features[:, [0, 500, 1000, 1500, 2047]], PYTORCH_FID, rtol=1e-4)


def test_no_picture_has_no_features(inception: InceptionFeatures) -> None:
    assert inception(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 2048)


def test_inception_is_loaded_from_the_listed_file(
    known_state: dict[str, Tensor], inception: InceptionFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "inception.pth"
    torch.save({**known_state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    listed(monkeypatch, path, "fid-inception")
    picture = pictures(1)
    np.testing.assert_array_equal(load_inception(progress=False)(picture), inception(picture))


# --- Clips


class Told(nn.Module):
    """Called as the published I3D: its features are what it was told and shown."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        frames = video.mean(dim=(1, 3, 4))  # (B, T)
        told = torch.tensor([float(rescale), float(resize), float(return_features)])
        shape = torch.tensor([float(size) for size in video.shape])
        seen = torch.cat([told, shape, video.min()[None], video.max()[None]])
        return torch.cat([frames, seen.expand(len(frames), -1), torch.zeros(len(frames), 374)], dim=1)


@pytest.fixture
def i3d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VideoFeatures:
    path = tmp_path / "i3d.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.(script|save)` is deprecated", FutureWarning)
        torch.jit.script(Told()).save(path)
    listed(monkeypatch, path, "fvd-i3d")
    return load_i3d(progress=False)


def test_i3d_is_called_as_published_on_clips_end_to_end(i3d: VideoFeatures) -> None:
    frames = np.zeros((2 * CLIP_FRAMES + 15, 8, 6, 3), np.uint8)
    frames[:] = np.arange(len(frames), dtype=np.uint8)[:, None, None, None]
    frames[20:22] = [[[[0]]], [[[255]]]]
    features = i3d(frames)
    assert (features.shape, features.dtype) == ((2, 400), np.float32)
    means = frames[:32, 0, 0, 0].reshape(2, 16) / 127.5 - 1
    np.testing.assert_allclose(features[:, :16], means, atol=1e-6)
    np.testing.assert_array_equal(features[:, 16:24], [[0, 0, 1, 1, 3, 16, 224, 224]] * 2)
    np.testing.assert_allclose(features[1, 24:26], [-1, 1], atol=1e-6)


def test_a_video_shorter_than_a_clip_has_no_features(i3d: VideoFeatures) -> None:
    assert i3d(np.zeros((CLIP_FRAMES - 1, 8, 8, 3), np.uint8)).shape == (0, 400)


@pytest.mark.parametrize(("name", "load"), [("fid-inception", load_inception), ("fvd-i3d", load_i3d)])
def test_a_file_of_another_hash_is_not_opened(
    name: str, load: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"as listed")
    listed(monkeypatch, path, name)
    path.write_bytes(b"something")
    with pytest.raises(DheadsError, match=r"cannot download .* put the file there by hand") as caught:
        load(progress=False)
    assert str(path) in str(caught.value)


def listed(monkeypatch: pytest.MonkeyPatch, path: Path, name: str) -> None:
    """That file in the cache is the one that weights.toml has under that name; it can be had nowhere else."""
    entry = {
        "kind": "metric",
        "file": path.name,
        "url": "http://127.0.0.1:1/absent",
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }
    monkeypatch.setattr(listing, "known", lambda: {name: entry})
    monkeypatch.setenv("DHEADS_HOME", str(path.parent))
